// A few threads that sleep until there is work. Which thread does what never changes a number: every output is
// computed whole by one of them.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace hnet {

class Pool {
 public:
  explicit Pool(int threads) : count_(threads < 1 ? 1 : threads) {
    for (int i = 1; i < count_; i++) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    call_ = nullptr;
    start_.fetch_add(1);
    start_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return count_; }

  // body(begin, end) over 0…tasks, in one contiguous part a thread; `cost` is a rough number of operations of all
  // tasks together, and what is not worth waking a thread for runs here.
  template <class Body>
  void run(int64_t tasks, int64_t cost, const Body& body) {
    constexpr int64_t WORTH_WAKING = 200000;
    if (count_ == 1 || tasks < 2 || cost < WORTH_WAKING) {
      if (tasks > 0) body(int64_t{0}, tasks);
      return;
    }
    tasks_ = tasks;
    body_ = &body;
    call_ = [](const void* b, int64_t begin, int64_t end) { (*static_cast<const Body*>(b))(begin, end); };
    pending_.store(count_ - 1);
    start_.fetch_add(1);
    start_.notify_all();
    part(0);
    for (int left = pending_.load(); left; left = pending_.load()) pending_.wait(left);
  }

 private:
  void part(int i) {
    const int64_t begin = tasks_ * i / count_, end = tasks_ * (i + 1) / count_;
    if (begin < end) call_(body_, begin, end);
  }
  void work(int i) {
    for (uint32_t seen = 0;;) {
      start_.wait(seen);
      seen = start_.load();
      if (!call_) return;
      part(i);
      if (pending_.fetch_sub(1) == 1) pending_.notify_one();
    }
  }

  const int count_;
  std::vector<std::thread> workers_;
  std::atomic<uint32_t> start_{0};
  std::atomic<int> pending_{0};
  int64_t tasks_ = 0;
  const void* body_ = nullptr;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
};

}  // namespace hnet
