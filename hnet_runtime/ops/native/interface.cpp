// The C interface: what binding.py calls. Raw pointers and sizes; no exception leaves.
#include <new>

#include "model.h"

using namespace hnet;

extern "C" {

int64_t hnet_interface() { return 1; }

int64_t hnet_lanes() { return LANES; }

void* hnet_open(const Model* model, int64_t threads) {
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

void hnet_product(const Matrix* m, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy, int64_t add,
                  int64_t threads) {
  Pool pool(static_cast<int>(threads));
  Quantized scratch;
  product(*m, x, ldx, rows, y, ldy, add != 0, pool, scratch);
}

}  // extern "C"
