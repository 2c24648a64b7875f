// The nearest code of every vector on a CPU: a matrix product whose scores never leave the registers.
//
// A score is x.c - |c|^2 / 2 in float32, the mean of the codes taken away from both. Codes are packed into panels of two
// registers' width, one code a lane, and rows into tiles. A panel stays in the first cache while the tiles of a chunk
// pass by, and a chunk in the second. All scores of a row come about in the same steps, whichever lane or thread takes
// them: copies of a code are equal to the last bit, and no answer depends on the number of threads.

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "work.h"

namespace {

constexpr int kTiles = 8, kStrip = 64;  // of a chunk, at most; floats of a mean
constexpr int64_t kChunk = 256 << 10;   // bytes of rows that a thread holds at once, but one tile at least
constexpr int64_t kBlock = 4 << 20;     // bytes of codes that are packed at once, but one panel at least
constexpr int64_t kPacked = 1 << 17;    // numbers to pack that are worth another thread
constexpr int64_t kProducts = 1 << 21;  // products that are
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Search {
  const float *vectors, *codebook;
  int64_t n, codes, dim;
  int64_t* found;
  int64_t first, block, tiles, room;  // the codes that are packed: from which, how many; tiles and floats of a chunk
  float *packed, *chunks, *best, *centre;
  std::atomic<int64_t> next{0}, threads{0};
  std::atomic<bool> finite{true};
};

template <int kBytes, int kRows>
struct Kernel {
  typedef float Floats __attribute__((vector_size(kBytes), may_alias));
  typedef int32_t Ints __attribute__((vector_size(kBytes), may_alias));
  static constexpr int kLanes = kBytes / sizeof(float), kPanel = 2 * kLanes;

  INLINE void average(Search& search) {
    for (int64_t k; (k = search.next++ * kStrip) < search.dim;) {
      const int64_t number = std::min<int64_t>(kStrip, search.dim - k);
      const float* code = search.codebook + k;
      double sums[kStrip] = {};
      for (int64_t i = 0; i < search.codes; ++i, code += search.dim)
        for (int64_t j = 0; j < number; ++j) sums[j] += code[j];
      for (int64_t j = 0; j < number; ++j) search.centre[k + j] = float(sums[j] / search.codes);
    }
  }

  // Centred rows become columns of `out`; those that are missing are zero. Returns the squares of their lengths.
  template <int kWidth>
  INLINE void transpose(const Search& search, const float* rows, int64_t number, float* out, float* squares) {
    float lines[kWidth][kLine] = {}, sums[kWidth][kLine] = {};
    for (int64_t k = 0; k < search.dim; k += kLine) {
      const int64_t depth = std::min<int64_t>(kLine, search.dim - k);
      for (int64_t i = 0; i < number; ++i) {
        const float *row = rows + i * search.dim + k, *centre = search.centre + k;
        for (int64_t j = 0; j < depth; ++j) {
          lines[i][j] = row[j] - centre[j];
          sums[i][j] += lines[i][j] * lines[i][j];
        }
      }
      for (int64_t j = 0; j < depth; ++j, out += kWidth)
        for (int i = 0; i < kWidth; ++i) out[i] = lines[i][j];
    }
    for (int i = 0; i < kWidth; ++i) squares[i] = std::accumulate(sums[i], sums[i] + kLine, 0.0f);
  }

  // A panel is a row of -|c|^2 / 2, and one of each coordinate. Where there is no code, no score is larger than any.
  INLINE void pack(Search& search) {
    const int64_t end = std::min(search.codes, search.first + search.block);
    for (int64_t first; (first = search.first + search.next++ * kPanel) < end;) {
      const int64_t number = std::min<int64_t>(kPanel, end - first);
      float* const panel = search.packed + (first - search.first) * (search.dim + 1);
      float squares[kPanel];
      transpose<kPanel>(search, search.codebook + first * search.dim, number, panel + kPanel, squares);
      for (int i = 0; i < kPanel; ++i) {
        if (!std::isfinite(squares[i])) search.finite = false;
        panel[i] = i < number ? squares[i] / -2 : -kInfinity;
      }
    }
  }

  INLINE void pack_tile(Search& search, int64_t first, float* tile) {
    const int64_t number = std::min<int64_t>(kRows, search.n - first);
    float squares[kRows];
    transpose<kRows>(search, search.vectors + first * search.dim, number, tile, squares);
    for (int i = 0; i < number; ++i) {
      if (std::isfinite(squares[i])) continue;  // then all scores are: the squares of the codes are finite, too
      search.best[first + i] = kInfinity;       // which no score exceeds
      search.found[first + i] = -1;
    }
  }

  // All scores of a tile and a panel. Meanwhile the next panel is fetched: `step` bytes of it for each coordinate.
  INLINE void meet(const float* rows, const Floats* codes, int64_t dim, int32_t number, const char* ahead, int64_t step,
                   Floats* best, Ints* which) {
    Floats first[kRows], second[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) first[r] = codes[0], second[r] = codes[1];
    for (int64_t k = 0; k < dim; ++k, rows += kRows, ahead += step) {
      __builtin_prefetch(ahead, 0, 2);
      codes += 2;
      const Floats left = codes[0], right = codes[1];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Floats value = rows[r] - Floats{};
        first[r] += value * left;
        second[r] += value * right;
      }
    }
    const Ints of_first = 2 * number - Ints{}, of_second = of_first + 1;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Ints later = second[r] > first[r];  // strictly, here and below: of equals the lower index stays
      const Floats larger = later ? second[r] : first[r];
      const Ints better = larger > best[r];
      best[r] = better ? larger : best[r];
      which[r] = better ? (later ? of_second : of_first) : which[r];
    }
  }

  INLINE void search(Search& search) {
    const int64_t dim = search.dim, chunk = search.tiles * kRows;
    const int64_t panels = (std::min(search.block, search.codes - search.first) + kPanel - 1) / kPanel;
    Floats* const best = reinterpret_cast<Floats*>(search.chunks + search.threads++ * search.room);
    Ints* const which = reinterpret_cast<Ints*>(best + chunk);
    float* const rows = reinterpret_cast<float*>(which + chunk);
    for (int64_t start; (start = search.next++ * chunk) < search.n;) {
      const int64_t number = std::min(chunk, search.n - start), tiles = (number + kRows - 1) / kRows;
      const int64_t step = (2 * kBytes + tiles - 1) / tiles;
      for (int64_t r = 0; r < number; r += kRows) pack_tile(search, start + r, rows + r * dim);
      for (int64_t r = 0; r < chunk; ++r) best[r] = -kInfinity - Floats{}, which[r] = Ints{};
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Floats* const codes = reinterpret_cast<Floats*>(search.packed) + panel * 2 * (dim + 1);
        const char* ahead = reinterpret_cast<const char*>(codes + 2 * (dim + 1));
        for (int64_t r = 0; r < number; r += kRows, ahead += dim * step)
          meet(rows + r * dim, codes, dim, int32_t(panel), ahead, step, best + r, which + r);
      }
      for (int64_t r = 0; r < number; ++r)
        settle(search, start + r, reinterpret_cast<float*>(best + r), reinterpret_cast<int32_t*>(which + r));
    }
  }

  INLINE void settle(Search& search, int64_t row, const float* best, const int32_t* which) {
    float largest = best[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = best[lane] > largest ? best[lane] : largest;
    if (!(largest > search.best[row])) return;
    int64_t lowest = search.codes;
    for (int lane = 0; lane < kLanes; ++lane)
      if (best[lane] == largest) lowest = std::min(lowest, int64_t(which[lane]) * kLanes + lane);
    search.best[row] = largest;
    search.found[row] = search.first + lowest;
  }
};

struct Way {
  int bytes, rows;
  Work average, pack, search;
};

#define WAY(name, target, bytes, rows)                                                                       \
  target void average_##name(void* search) { Kernel<bytes, rows>::average(*static_cast<Search*>(search)); } \
  target void pack_##name(void* search) { Kernel<bytes, rows>::pack(*static_cast<Search*>(search)); }       \
  target void search_##name(void* search) { Kernel<bytes, rows>::search(*static_cast<Search*>(search)); }   \
  constexpr Way name{bytes, rows, average_##name, pack_##name, search_##name};

// Two scores' registers a row, two of codes and one value fill the 32 or 16 registers that there are.
#if defined(__x86_64__)
WAY(avx512, __attribute__((target("avx512f"))), 64, 14)
WAY(avx2, __attribute__((target("avx2,fma"))), 32, 6)
WAY(plain, , 16, 6)
#else
WAY(plain, , 16, 12)
#endif

void step(Work work, Search& search, int threads, bool pool) {
  search.next = search.threads = 0;
  on_threads(work, &search, threads, pool);
}

}  // namespace

// The bytes of a register on this processor, or 0 where a library's product is faster than what follows.
extern "C" int provq_register() {
  const int widest = widest_register();
#if defined(__x86_64__)
  if (widest == plain.bytes) return 0;
#endif
  return widest;
}

// Writes the index of the nearest code of each vector, or -1 where its squared length is not finite: everywhere, if that
// is so of a code or there is no memory. There is at least one code.
// `width`: bytes of the registers to use, at most those there are. `pool`: whether the threads of torch are alive.
extern "C" void provq_nearest_code(const float* vectors, int64_t n, const float* codebook, int64_t codes, int64_t dim,
                                   int width, int threads, bool pool, int64_t* found) {
#if defined(__x86_64__)
  const Way& way = width == avx512.bytes ? avx512 : width == avx2.bytes ? avx2 : plain;
#else
  const Way& way = plain;
  (void)width;
#endif
  const int packers = worth(threads, codes * dim, kPacked);
  threads = worth(threads, n * codes * std::max<int64_t>(dim, kLine), kProducts);
  const int64_t panel = 2 * way.bytes / sizeof(float), panels = (codes + panel - 1) / panel;
  const int64_t tiles = std::min(kChunk / (way.rows * (dim + 1) * 4), n / way.rows / (4 * threads));
  Search search;
  search.vectors = vectors, search.codebook = codebook, search.found = found;
  search.n = n, search.codes = codes, search.dim = dim;
  search.tiles = std::max<int64_t>(1, std::min<int64_t>(kTiles, tiles));
  search.room = whole_lines(search.tiles * way.rows * (dim + panel));
  search.block = panel * std::min(panels, std::max<int64_t>(1, kBlock / (panel * (dim + 1) * 4)));
  const int64_t chunks = whole_lines(search.block * (dim + 1)), best = chunks + threads * search.room;
  static thread_local Memory memory;
  std::fill_n(found, n, -1);
  if (!memory.holds(best + n + dim)) return;
  search.packed = memory.floats.get(), search.chunks = search.packed + chunks;
  search.best = search.packed + best, search.centre = search.best + n;
  std::fill_n(search.best, n, -kInfinity);
  std::fill_n(found, n, 0);
  step(way.average, search, packers, pool);
  for (search.first = 0; search.first < codes && search.finite; search.first += search.block) {
    step(way.pack, search, packers, pool);
    step(way.search, search, threads, pool);
  }
  if (!search.finite) std::fill_n(found, n, -1);
}
