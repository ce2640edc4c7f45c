// A row of logits becomes its cross-entropy and, in place, its gradient: read twice, written once. Its exponentials
// are kept in fp32, which fits a core's cache. training/model/loss_native.py compiles this file.

#include "simd.h"

#include <cmath>
#include <vector>

namespace {

void keep(float x, float* to) { *to = x; }
void keep(float x, uint16_t* to) { *to = rounded(x); }

// The loss of a row. `powers` holds `columns` values, and fills the last vector.
template <class Logit>
float row_loss(Logit* logits, long columns, long target, float share, float z_loss, float* powers) {
  Vec tops = spread(-INFINITY);
  for (long j = 0; j < columns; j += WIDTH) tops = larger(tops, load(logits + j, columns - j), columns - j);
  float top = largest_of(tops);
  Vec sums = zeros();
  for (long j = 0; j < columns; j += WIDTH) {
    Vec power = first(exponential(load(logits + j, columns - j) - spread(top)), columns - j);
    store(powers + j, power);
    sums = sums + power;
  }
  float sum = sum_of(sums), log_z = top + std::log(sum), at_target = widen(logits[target]);
  float factor = share * (1 + 2 * z_loss * log_z) / sum;
  for (long j = 0; j < columns; j += WIDTH) store(logits + j, load(powers + j) * spread(factor), columns - j);
  keep(powers[target] * factor - share, logits + target);
  return log_z - at_target + z_loss * log_z * log_z;
}

template <class Logit>
void all_rows(Logit* logits, const int64_t* targets, float* losses, long rows, long columns, float share, float z_loss,
              long ignored, long threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> powers((columns + WIDTH - 1) / WIDTH * WIDTH);
#pragma omp for schedule(static)
    for (long i = 0; i < rows; i++) {
      Logit* row = logits + i * columns;
      losses[i] = 0;
      if (targets[i] == ignored)
        std::fill(row, row + columns, Logit(0));
      else
        losses[i] = row_loss(row, columns, targets[i], share, z_loss, powers.data());
    }
  }
}

}  // namespace

extern "C" void losses_and_gradients(void* logits, long logits_are_bf16, const int64_t* targets, float* losses,
                                     long rows, long columns, float share, float z_loss, long ignored, long threads) {
  if (logits_are_bf16)
    all_rows((uint16_t*)logits, targets, losses, rows, columns, share, z_loss, ignored, threads);
  else
    all_rows((float*)logits, targets, losses, rows, columns, share, z_loss, ignored, threads);
}
