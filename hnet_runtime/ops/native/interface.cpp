// The C interface: what binding.py calls. Raw pointers and sizes; no exception leaves.
#include <new>

#include "model.h"
#include "sampler.h"
#include "twins.h"

using namespace hnet;

extern "C" {

int64_t hnet_interface() { return 3; }

int64_t hnet_lanes() { return LANES; }

int64_t hnet_word_multiple(int64_t kind) { return word_multiple(kind); }

// Whether this process may run the code: the system can refuse registers that the processor has. To be asked before
// any product runs, since asking is what gets them.
int64_t hnet_usable() {
#if defined(HNET_AMX)
  return amx_permitted();
#else
  return 1;
#endif
}

void* hnet_open(const Model* model, int64_t threads) {
  if (!hnet_usable()) return nullptr;
  try {
    return new Forward(*model, static_cast<int>(threads));
  } catch (...) {
    return nullptr;
  }
}

void hnet_close(void* forward) { delete static_cast<Forward*>(forward); }

// 0, or −1 where memory ran out.
int64_t hnet_forward(void* forward, int64_t count, const int64_t* rows, const int64_t* lengths, const uint8_t* bytes,
                     const int64_t* num_logits, float* logits, StageReport* reports) {
  try {
    static_cast<Forward*>(forward)->run(count, rows, lengths, bytes, num_logits, logits, reports);
    return 0;
  } catch (...) {
    return -1;
  }
}

int64_t hnet_step(void* forward, int64_t first, int64_t count, const int64_t* rows, const uint8_t* bytes, int64_t parks,
                  uint8_t* finished, float* logits, StageReport* reports) {
  try {
    static_cast<Forward*>(forward)->step(first, count, rows, bytes, parks != 0, finished, logits, reports);
    return 0;
  } catch (...) {
    return -1;
  }
}

// The next byte of each of `rows` rows of logits [rows, 256], −1 where one is not finite.
void hnet_sample(int64_t rows, const float* logits, const Draw* draws, int64_t* bytes) {
  for (int64_t r = 0; r < rows; r++) bytes[r] = sample(logits + r * VOCAB, draws[r]);
}

void hnet_product(const Matrix* m, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy, int64_t add,
                  int64_t threads) {
  Pool pool(static_cast<int>(threads));
  Quantized scratch;
  product(*m, x, ldx, rows, y, ldy, add != 0, pool, scratch);
}

}  // extern "C"
