// SiLU of a group normalisation on a CPU, and its gradients: each pass reads values once, and only the result is kept.
//
// Channels are last. A row is so many positions, as they lie in memory, that their channels fill whole registers; what
// is left at the end of a sample is filled up with zeros in a row of its own. Sums are taken over blocks of rows, which
// depend on the shape alone, and blocks are added in their order: no result depends on the number of threads. What is
// squared is summed in float64, for values may lie far from zero; gradients are in float32 within a block.

#include <atomic>
#include <cmath>
#include <limits>

#include "work.h"

namespace {

constexpr int64_t kRow = 256, kBlock = 1 << 15;  // floats of a row, at least; of a block
constexpr int64_t kRows = 16;                    // of a block, at least
constexpr int64_t kShare = 1 << 15;              // floats that are worth another thread

struct Normalisation {
  const float *values, *gradients, *weight, *bias;
  int64_t samples, positions, channels, groups;
  float* out;
  int64_t together, row, block, blocks;  // positions and floats of a row, floats of a block, blocks of a sample
  double* sums;                          // two for each channel of each block
  double* totals;                        // two for each channel of one sample
  double* of_parameters;                 // the gradients of both, in float64
  float* factors;                        // of each sample, `kFactors` rows
  float* rooms;                          // of each thread: two rows of sums, in float64, and three of values
  std::atomic<int64_t> next{0}, threads{0};

  int64_t floats() const { return positions * channels; }
};

// A value x has z = (x - centre) * scale + shift, and the gradient dz * scale + (x - centre) * slope + level.
enum Factor { kCentre, kScale, kShift, kSlope, kLevel, kFactors };
constexpr int kRoom = 7;  // rows

template <int kBytes>
struct Kernel {
  typedef float Floats __attribute__((vector_size(kBytes)));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(kBytes), may_alias));
  static constexpr int kLanes = kBytes / sizeof(float);

  INLINE const Unaligned* at(const float* floats) { return reinterpret_cast<const Unaligned*>(floats); }
  INLINE Unaligned* at(float* floats) { return reinterpret_cast<Unaligned*>(floats); }

  // e^-z, to some units of the last place; infinite where z < -88, never less than 10^-38.
  INLINE void exponential_of_negative(const Floats& z, Floats& exponential) {
    constexpr float kToInteger = 3 << 22;  // added to a small number it leaves no room for a fraction
    const Floats infinity = std::numeric_limits<float>::infinity() - Floats{}, most = 88 - Floats{}, least = 1 - most;
    Floats x = -z;
    x = x > most ? most : x;
    x = x < least ? least : x;
    const Floats moved = x * 1.44269504f + kToInteger, whole = moved - kToInteger;
    const Floats rest = (x - whole * 0.693145751953125f) - whole * 1.42860682e-6f;  // the logarithm of 2, in two parts
    Floats series = rest * (1.0f / 5040) + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    const Ints power = (reinterpret_cast<Ints>(moved) - 0x4b400000 + 127) << 23;
    exponential = z < -most ? infinity : series * reinterpret_cast<Floats>(power);
  }

  INLINE void silu(const Floats& z, Floats& made) {
    Floats exponential;
    exponential_of_negative(z, exponential);
    made = z / (1.0f + exponential);
  }

  INLINE void derivative_of_silu(const Floats& z, Floats& derivative) {
    Floats exponential;
    exponential_of_negative(z, exponential);
    const Floats sigmoid = 1.0f / (1.0f + exponential);
    derivative = sigmoid * (1.0f + z * (1.0f - sigmoid));
  }

  // A row, or a copy of what is left of one.
  INLINE const float* whole(const float* row, int64_t number, int64_t wanted, float* room) {
    if (number == wanted) return row;
    std::fill(std::copy_n(row, number, room), room + wanted, 0.0f);
    return room;
  }

  template <class Sum>
  INLINE void fold(const Normalisation& norm, const Sum* sums, double* folded) {
    for (int64_t c = 0; c < norm.channels; ++c) folded[c] = sums[c];
    for (int64_t i = 1; i < norm.together; ++i)
      for (int64_t c = 0; c < norm.channels; ++c) folded[c] += sums[i * norm.channels + c];
  }

  // Sums of values and of their squares.
  INLINE void measure(Normalisation& norm) {
    const int64_t row = norm.row, floats = norm.floats();
    double* const __restrict sums = reinterpret_cast<double*>(norm.rooms + norm.threads++ * kRoom * row);
    double* const __restrict squares = sums + row;
    float* const room = reinterpret_cast<float*>(squares + row);
    for (int64_t block; (block = norm.next++) < norm.samples * norm.blocks;) {
      const float* const values = norm.values + block / norm.blocks * floats;
      const int64_t first = block % norm.blocks * norm.block, end = std::min(floats, first + norm.block);
      std::fill_n(sums, 2 * row, 0.0);
      for (int64_t i = first; i < end; i += row) {
        const float* const x = whole(values + i, std::min(row, end - i), row, room);
        for (int64_t j = 0; j < row; ++j) {
          const double value = x[j];
          sums[j] += value;
          squares[j] += value * value;
        }
      }
      fold(norm, sums, norm.sums + 2 * block * norm.channels);
      fold(norm, squares, norm.sums + (2 * block + 1) * norm.channels);
    }
  }

  INLINE void apply(Normalisation& norm) {
    const int64_t row = norm.row, floats = norm.floats();
    float* const room = norm.rooms + norm.threads++ * kRoom * row;
    for (int64_t block; (block = norm.next++) < norm.samples * norm.blocks;) {
      const int64_t sample = block / norm.blocks, start = sample * floats;
      const int64_t first = block % norm.blocks * norm.block, end = std::min(floats, first + norm.block);
      const float* const factors = norm.factors + sample * kFactors * row;
      for (int64_t i = first; i < end; i += row) {
        const int64_t number = std::min(row, end - i);
        const float* const x = whole(norm.values + start + i, number, row, room);
        float* const y = number == row ? norm.out + start + i : room;
        for (int64_t j = 0; j < row; j += kLanes) {
          const float* const factor = factors + j;
          const Floats z = (*at(x + j) - *at(factor)) * *at(factor + kScale * row) + *at(factor + kShift * row);
          Floats made;
          silu(z, made);
          *at(y + j) = made;
        }
        if (number < row) std::copy_n(room, number, norm.out + start + i);
      }
    }
  }

  // Sums of dz, the gradients of z, and of dz * (x - centre).
  INLINE void accumulate(Normalisation& norm) {
    const int64_t row = norm.row, floats = norm.floats();
    float* const sums = norm.rooms + norm.threads++ * kRoom * row;
    float* const room = sums + 2 * row;
    for (int64_t block; (block = norm.next++) < norm.samples * norm.blocks;) {
      const int64_t sample = block / norm.blocks, start = sample * floats;
      const int64_t first = block % norm.blocks * norm.block, end = std::min(floats, first + norm.block);
      const float* const factors = norm.factors + sample * kFactors * row;
      std::fill_n(sums, 2 * row, 0.0f);
      for (int64_t i = first; i < end; i += row) {
        const int64_t number = std::min(row, end - i);
        const float* const x = whole(norm.values + start + i, number, row, room);
        const float* const g = whole(norm.gradients + start + i, number, row, room + row);
        for (int64_t j = 0; j < row; j += kLanes) {
          const float* const factor = factors + j;
          const Floats far = *at(x + j) - *at(factor);
          const Floats z = far * *at(factor + kScale * row) + *at(factor + kShift * row);
          Floats dz;
          derivative_of_silu(z, dz);
          dz *= *at(g + j);
          *at(sums + j) += dz;
          *at(sums + row + j) += dz * far;
        }
      }
      fold(norm, sums, norm.sums + 2 * block * norm.channels);
      fold(norm, sums + row, norm.sums + (2 * block + 1) * norm.channels);
    }
  }

  INLINE void propagate(Normalisation& norm) {
    const int64_t row = norm.row, floats = norm.floats();
    float* const room = norm.rooms + norm.threads++ * kRoom * row;
    for (int64_t block; (block = norm.next++) < norm.samples * norm.blocks;) {
      const int64_t sample = block / norm.blocks, start = sample * floats;
      const int64_t first = block % norm.blocks * norm.block, end = std::min(floats, first + norm.block);
      const float* const factors = norm.factors + sample * kFactors * row;
      for (int64_t i = first; i < end; i += row) {
        const int64_t number = std::min(row, end - i);
        const float* const x = whole(norm.values + start + i, number, row, room);
        const float* const g = whole(norm.gradients + start + i, number, row, room + row);
        float* const out = number == row ? norm.out + start + i : room;
        for (int64_t j = 0; j < row; j += kLanes) {
          const float* const factor = factors + j;
          const Floats far = *at(x + j) - *at(factor), scale = *at(factor + kScale * row);
          const Floats z = far * scale + *at(factor + kShift * row);
          Floats dz;
          derivative_of_silu(z, dz);
          dz *= *at(g + j);
          *at(out + j) = dz * scale + (far * *at(factor + kSlope * row) + *at(factor + kLevel * row));
        }
        if (number < row) std::copy_n(room, number, norm.out + start + i);
      }
    }
  }
};

struct Way {
  Work measure, apply, accumulate, propagate;
};

#define PASS(name, target, bytes, pass) \
  target void pass##_##name(void* norm) { Kernel<bytes>::pass(*static_cast<Normalisation*>(norm)); }
#define WAY(name, target, bytes)         \
  PASS(name, target, bytes, measure)     \
  PASS(name, target, bytes, apply)       \
  PASS(name, target, bytes, accumulate)  \
  PASS(name, target, bytes, propagate)   \
  constexpr Way name{measure_##name, apply_##name, accumulate_##name, propagate_##name};

WAY(plain, , 16)
#if defined(__x86_64__)
WAY(avx512, __attribute__((target("avx512f"))), 64)
WAY(avx2, __attribute__((target("avx2,fma"))), 32)
#endif

const Way& way_of(int bytes) {
#if defined(__x86_64__)
  if (bytes == 64) return avx512;
  if (bytes == 32) return avx2;
#endif
  (void)bytes;
  return plain;
}

void pass(Work work, Normalisation& norm, int threads, bool pool) {
  norm.next = norm.threads = 0;
  on_threads(work, &norm, threads, pool);
}

// Divides the work by its shape, and finds memory for it.
bool prepared(Normalisation& norm, int threads) {
  static thread_local Memory memory;
  norm.together = 1;
  while (norm.together * norm.channels % kLine) ++norm.together;
  norm.together *= std::max<int64_t>(1, kRow / (norm.together * norm.channels));
  norm.row = norm.together * norm.channels;
  norm.block = norm.row * std::max(kRows, kBlock / norm.row);
  norm.blocks = (norm.floats() + norm.block - 1) / norm.block;
  const int64_t sums = whole_lines(4 * norm.samples * norm.blocks * norm.channels);
  const int64_t total = whole_lines(4 * norm.channels), factors = norm.samples * kFactors * norm.row;
  if (!memory.holds(sums + 2 * total + factors + threads * kRoom * norm.row)) return false;
  norm.sums = reinterpret_cast<double*>(memory.floats.get());
  norm.totals = reinterpret_cast<double*>(memory.floats.get() + sums);
  norm.of_parameters = reinterpret_cast<double*>(memory.floats.get() + sums + total);
  norm.factors = memory.floats.get() + sums + 2 * total;
  norm.rooms = norm.factors + factors;
  return true;
}

void add_blocks(const Normalisation& norm, int64_t sample) {
  std::fill_n(norm.totals, 2 * norm.channels, 0.0);
  const double* sums = norm.sums + sample * norm.blocks * 2 * norm.channels;
  for (int64_t i = 0; i < norm.blocks; ++i)
    for (int64_t c = 0; c < 2 * norm.channels; ++c) norm.totals[c] += *sums++;
}

// The mean of each group of each sample, and by what its values are divided, inverted.
void settle_statistics(const Normalisation& norm, double epsilon, double* statistics) {
  const int64_t width = norm.channels / norm.groups;
  const double number = double(width) * norm.positions;
  for (int64_t sample = 0; sample < norm.samples; ++sample) {
    add_blocks(norm, sample);
    for (int64_t group = 0; group < norm.groups; ++group, statistics += 2) {
      double sum = 0, squares = 0;
      for (int64_t c = group * width; c < (group + 1) * width; ++c)
        sum += norm.totals[c], squares += norm.totals[norm.channels + c];
      const double mean = sum / number, variance = squares / number - mean * mean;
      statistics[0] = mean;
      statistics[1] = 1 / std::sqrt((variance < 0 ? 0 : variance) + epsilon);
    }
  }
}

// One factor of all channels, as often as there are positions in a row.
void repeat(const Normalisation& norm, float* factor) {
  for (int64_t i = norm.channels; i < norm.row; ++i) factor[i] = factor[i - norm.channels];
}

// What a mean has beyond the digits of a float32 goes into the shift.
void settle_normalisation(const Normalisation& norm, const double* statistics) {
  const int64_t width = norm.channels / norm.groups, row = norm.row;
  for (int64_t sample = 0; sample < norm.samples; ++sample) {
    float* const factors = norm.factors + sample * kFactors * row;
    for (int64_t group = 0; group < norm.groups; ++group, statistics += 2) {
      const float centre = float(statistics[0]);
      const double inverse = statistics[1], beyond = statistics[0] - centre;
      for (int64_t c = group * width; c < (group + 1) * width; ++c) {
        const double scale = norm.weight[c] * inverse;
        factors[kCentre * row + c] = centre;
        factors[kScale * row + c] = float(scale);
        factors[kShift * row + c] = float(norm.bias[c] - beyond * scale);
      }
    }
    for (int factor : {kCentre, kScale, kShift}) repeat(norm, factors + factor * row);
  }
}

// With d the mean over a group of weight * dz, and s that of weight * dz * n, where n is a normalised value: the
// gradient of a value is (weight * dz - d - n * s) / deviation, of a weight the sum of dz * n, of a bias that of dz.
void settle_gradients(const Normalisation& norm, const double* statistics) {
  const int64_t width = norm.channels / norm.groups, row = norm.row;
  const double number = double(width) * norm.positions;
  std::fill_n(norm.of_parameters, 2 * norm.channels, 0.0);
  for (int64_t sample = 0; sample < norm.samples; ++sample) {
    add_blocks(norm, sample);
    float* const factors = norm.factors + sample * kFactors * row;
    for (int64_t group = 0; group < norm.groups; ++group, statistics += 2) {
      const double inverse = statistics[1], beyond = statistics[0] - float(statistics[0]);
      double straight = 0, along = 0;
      for (int64_t c = group * width; c < (group + 1) * width; ++c) {
        const double of_bias = norm.totals[c];
        const double of_weight = (norm.totals[norm.channels + c] - beyond * of_bias) * inverse;
        norm.of_parameters[c] += of_weight;
        norm.of_parameters[norm.channels + c] += of_bias;
        straight += norm.weight[c] * of_bias / number;
        along += norm.weight[c] * of_weight / number;
      }
      const double slope = -inverse * inverse * along;
      std::fill_n(factors + kSlope * row + group * width, width, float(slope));
      std::fill_n(factors + kLevel * row + group * width, width, float(-inverse * straight - beyond * slope));
    }
    for (int factor : {kSlope, kLevel}) repeat(norm, factors + factor * row);
  }
}

}  // namespace

// The bytes of a register on this processor.
extern "C" int provq_register() { return widest_register(); }

// Writes what is made of each value, and for each group of each sample the mean and the inverse of the deviation.
// Returns whether there was memory for it.
// `width`: bytes of the registers to use, at most those there are. `pool`: whether the threads of torch are alive.
extern "C" bool provq_silu_of_group_norm(const float* values, const float* weight, const float* bias, int64_t samples,
                                         int64_t positions, int64_t channels, int64_t groups, double epsilon, int width,
                                         int threads, bool pool, double* statistics, float* out) {
  Normalisation norm;
  norm.values = values, norm.weight = weight, norm.bias = bias, norm.out = out;
  norm.samples = samples, norm.positions = positions, norm.channels = channels, norm.groups = groups;
  threads = worth(threads, samples * positions * channels, kShare);
  if (!prepared(norm, threads)) return false;
  const Way& way = way_of(width);
  pass(way.measure, norm, threads, pool);
  settle_statistics(norm, epsilon, statistics);
  settle_normalisation(norm, statistics);
  pass(way.apply, norm, threads, pool);
  return true;
}

// Writes the gradients of weight and bias, and, unless it is null, of the values, from those of what was made of them.
extern "C" bool provq_silu_of_group_norm_backward(const float* values, const float* gradients, const float* weight,
                                                  const float* bias, const double* statistics, int64_t samples,
                                                  int64_t positions, int64_t channels, int64_t groups, int width,
                                                  int threads, bool pool, float* of_values, float* of_weight,
                                                  float* of_bias) {
  Normalisation norm;
  norm.values = values, norm.gradients = gradients, norm.weight = weight, norm.bias = bias, norm.out = of_values;
  norm.samples = samples, norm.positions = positions, norm.channels = channels, norm.groups = groups;
  threads = worth(threads, samples * positions * channels, kShare);
  if (!prepared(norm, threads)) return false;
  const Way& way = way_of(width);
  settle_normalisation(norm, statistics);
  pass(way.accumulate, norm, threads, pool);
  settle_gradients(norm, statistics);
  if (of_values) pass(way.propagate, norm, threads, pool);
  std::copy_n(norm.of_parameters, channels, of_weight);
  std::copy_n(norm.of_parameters + channels, channels, of_bias);
  return true;
}
