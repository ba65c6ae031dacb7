// AMX tiles: bfloat16 products for floats, int8 products for integers.
//
// A float32 is the sum of three bfloat16 (its 24 bits in parts of eight, cut and not rounded), and codes of up to 8 bits are bfloat16
// themselves. So x w is the sum of three products that float32 holds exactly: the tiles round nothing but their sums, as a float32 dot
// product does. bfloat16 rows need one product.
#if defined(__x86_64__) && defined(__linux__)
#include <new>

#include "vectors512.inc"
#define QJAX_HELPERS_ONLY
#include "generic.inc"

namespace {

constexpr int64_t kTile = 16;            // rows of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSpan = 16;            // units that one float32 sum may run over: 512 k

inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

// The parts of a float32 row; those of up to five rows stand in one tile, rows of a part together.
inline int parts_of(const Rows& r) { return r.dtype == Dtype::kBF16 ? 1 : 3; }
inline bool stacked(const Rows& r) { return r.count * parts_of(r) <= kTile; }
inline int planes_of(const Rows& r) { return stacked(r) ? 1 : parts_of(r); }
// Tiles that are not full stand close together, so that the first cache holds them.
inline int64_t plane_bytes(const Rows& r) { return stacked(r) ? r.count * parts_of(r) * 2 * kUnit : kTileBytes; }

// k of one product of int8 tiles.
inline int64_t byte_span(const Weight& w) { return w.group_padded % 64 == 0 ? 64 : 32; }

size_t amx_bytes(const Weight& w, const Rows& r) {
  if (r.integer) return tiles_of(r.count) * kTile * w.k_padded();
  return tiles_of(r.count) * (w.k_padded() / kUnit) * planes_of(r) * plane_bytes(r);
}

// Float rows: (tile of rows, unit, plane) tiles of 16 rows and 32 bfloat16; eight k stand as 0 2 4 6 1 3 5 7, which is how the pairs of a
// decoded vector of nibbles come.
void prepare_planes(const Weight& w, const Rows& r, int64_t r0, int64_t r1) {
  const int parts = parts_of(r), planes = planes_of(r);
  const int64_t words = plane_bytes(r) / 2;
  const bool together = stacked(r);
  const int64_t units = w.group_padded / kUnit, all = w.groups * units;
  alignas(64) float buffer[4096];
  for (int64_t m = r0; m < (r1 + kTile - 1) / kTile * kTile; ++m) {
    if (m >= r.count && together) break;
    uint16_t* tiles = static_cast<uint16_t*>(r.data) + (m / kTile) * all * planes * words;
    if (m < r.count) r.scales[m] = 1;
    for (int64_t g = 0; g < w.groups; ++g) {
      float sum = 0;
      for (int64_t first = 0; first < units; first += 4096 / kUnit) {
        const int64_t count = units - first < 4096 / kUnit ? units - first : 4096 / kUnit;
        const int64_t k0 = g * w.group + first * kUnit;
        int64_t n = w.group - first * kUnit < count * kUnit ? w.group - first * kUnit : count * kUnit;
        n = w.k - k0 < n ? w.k - k0 : n;
        if (n < 0 || m >= r.count) n = 0;
        if (n > 0 && r.dtype == Dtype::kF32) {
          std::memcpy(buffer, static_cast<const float*>(r.x) + m * w.k + k0, 4 * n);
        } else if (n > 0) {
          const uint16_t* x = static_cast<const uint16_t*>(r.x) + m * w.k + k0;
          for (int64_t i = 0; i < n; ++i) buffer[i] = bf16_to_float(x[i]);
        }
        for (int64_t i = n; i < count * kUnit; ++i) buffer[i] = 0;
        if (w.zero != Zero::kNone && m < r.count) sum += pairwise(buffer, count * kUnit);
        const __m512i order = _mm512_set_epi32(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
        const __m512i top = _mm512_set1_epi32(int(0xffff0000u));
        for (int64_t u = 0; u < count; ++u)
          for (int h = 0; h < 2; ++h) {
            __m512 x = _mm512_permutexvar_ps(order, _mm512_loadu_ps(buffer + u * kUnit + 16 * h));
            uint16_t* at = tiles + ((g * units + first + u) * planes) * words + 16 * h;
            for (int part = 0; part < parts; ++part) {
              const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), top);
              // Nothing is left of an infinity or a NaN: their difference with themselves would be NaN.
              const __mmask16 finite = _mm512_cmp_epu32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000)), _mm512_set1_epi32(0x7f800000), _MM_CMPINT_LT);
              uint16_t* row = together ? at + (part * r.count + m) * kUnit : at + part * words + (m % kTile) * kUnit;
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
              x = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(bits));
            }
          }
      }
      if (w.zero != Zero::kNone && m < r.count) r.fsums[m * w.groups + g] = sum;
    }
  }
}

// Integer rows: (tile of rows, span of k) tiles of 16 rows and `byte_span` bytes.
void prepare_bytes(const Weight& w, const Rows& r, int64_t r0, int64_t r1) {
  const int64_t span = byte_span(w), spans = w.k_padded() / span;
  int8_t* row = new int8_t[w.k_padded()];
  for (int64_t m = r0; m < (r1 + kTile - 1) / kTile * kTile; ++m) {
    int8_t* tiles = static_cast<int8_t*>(r.data) + (m / kTile) * kTile * w.k_padded() + (m % kTile) * span;
    if (m < r.count)
      prepare_row_codes(w, r, m, row);
    else if (r.count > kTile)
      std::memset(row, 0, w.k_padded());
    else
      break;
    for (int64_t s = 0; s < spans; ++s) std::memcpy(tiles + s * kTile * span, row + s * span, span);
  }
  delete[] row;
}

// Values of a table are no bfloat16, and for very few rows codes are multiplied sooner than stored.
inline bool without_tiles(const Weight& w, const Rows& r) {
  return w.codebook || (r.integer ? w.bits != 8 && r.count < 4 : r.count <= (w.bits == 8 ? 3 : 2));
}

void amx_prepare(const Weight& w, const Rows& r, int64_t r0, int64_t r1) {
  if (without_tiles(w, r))
    avx512_vnni()->prepare(w, r, r0, r1);
  else if (r.integer)
    prepare_bytes(w, r, r0, r1);
  else
    prepare_planes(w, r, r0, r1);
}
size_t amx_size(const Weight& w, const Rows& r) { return without_tiles(w, r) ? avx512_vnni()->bytes(w, r) : amx_bytes(w, r); }

// ---- the other operand: decoded tiles ----------------------------------------------------------------------------------------------

// A unit of 32 k and 16 rows of the weight as a tile of bfloat16.
template <int BITS>
inline void decode_floats(const uint8_t* unit, const __m512i table, uint8_t* tile) {
  if constexpr (BITS == 8) {
    for (int v = 0; v < 8; ++v) {
      const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(unit + 64 * v), _mm512_set1_epi32(int(0x80808080u)));
      // Bytes 0 and 2 of each lane are a pair, 1 and 3 another.
      const __m512i b0 = _mm512_srai_epi32(_mm512_slli_epi32(bytes, 24), 24), b1 = _mm512_srai_epi32(_mm512_slli_epi32(bytes, 16), 24);
      const __m512i b2 = _mm512_srai_epi32(_mm512_slli_epi32(bytes, 8), 24), b3 = _mm512_srai_epi32(bytes, 24);
      auto pair = [](__m512i low, __m512i high) {  // integers of 8 bits are bfloat16 exactly: the low half of the float is zero
        const __m512i l = _mm512_castps_si512(_mm512_cvtepi32_ps(low)), h = _mm512_castps_si512(_mm512_cvtepi32_ps(high));
        return _mm512_or_si512(_mm512_srli_epi32(l, 16), h);
      };
      const int row = 4 * (v / 2) + (v & 1);
      _mm512_store_si512(tile + 64 * row, pair(b0, b2));
      _mm512_store_si512(tile + 64 * (row + 2), pair(b1, b3));
    }
  } else {
    VU nib[4];
    nibbles<BITS>(unit, 0, nib);
    for (int v = 0; v < 4; ++v)
      for (int i = 0; i < 4; ++i)
        _mm512_store_si512(tile + 64 * (4 * v + i), _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)nib[v], 4 * i), table));
  }
}

inline __m512i float_table(const Weight& w) {
  alignas(64) uint16_t words[32];
  for (int i = 0; i < 32; ++i) {
    uint32_t bits;
    std::memcpy(&bits, w.table + (i & 15), 4);
    words[i] = uint16_t(bits >> 16);
  }
  return _mm512_load_si512(words);
}

// `span` k and 16 rows of the weight as a tile of unsigned bytes.
template <int BITS>
inline void decode_bytes(const uint8_t* unit, int64_t units, uint8_t* tile) {
  const VU mask = VU{} + 0x0f0f0f0fu;
  for (int64_t u = 0; u < units; ++u) {
    VU nib[4];
    nibbles<BITS>(unit + u * BITS * 64, 0, nib);
    for (int v = 0; v < 4; ++v) {
      _mm512_store_si512(tile + 512 * u + 128 * v, (__m512i)(nib[v] & mask));
      _mm512_store_si512(tile + 512 * u + 128 * v + 64, (__m512i)((nib[v] >> 4) & mask));
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums; 4, 5: rows of x; 6, 7: rows of the weight.
inline void configure(int rows, int row_bytes) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = t < 6 ? rows : row_bytes / 4;
    c.columns[t] = t == 4 || t == 5 ? row_bytes : 64;
  }
  _tile_loadconfig(&c);
}

// The intrinsics paste the numbers of tiles into assembly, so they are literals.
#define QJAX_MULTIPLY(C, A, B)        \
  do {                                \
    if constexpr (INTEGER)            \
      _tile_dpbsud(C, A, B);          \
    else                              \
      _tile_dpbf16ps(C, A, B);        \
  } while (false)

// Adds the sums of one group to acc (rows, 16). `tile` holds 16 x 16 of them.
template <bool INTEGER>
inline void add_group(const Weight& w, const Rows& r, int64_t block, int64_t g, bool whole, int64_t m0, int64_t rows, int parts, const float* tile, float* acc) {
  const int64_t at = (block * w.groups + g) * kLanes;
  const VF scale = load<VF>(w.scales + at);
  if constexpr (INTEGER) {
    for (int64_t m = 0; m < rows; ++m) {
      const VI total = load<VI>(tile + 16 * m);
      store(acc + 16 * m, load<VF>(acc + 16 * m) + integer_group(w, at, total, w.bits == 8 ? 128 : w.center, r.isums[(m0 + m) * w.groups + g]));
    }
  } else {
    const bool zero = w.zero != Zero::kNone && whole;
    const VF zeros = zero ? zero_vector(w, at) : VF{};
    for (int64_t m = 0; m < rows; ++m) {
      VF sum = load<VF>(tile + 16 * m);
      for (int p = 1; p < parts; ++p) sum += load<VF>(tile + 16 * (m + p * rows));
      if (zero) sum -= zeros * r.fsums[(m0 + m) * w.groups + g];
      store(acc + 16 * m, load<VF>(acc + 16 * m) + sum * scale);
    }
  }
}

// ---- few rows: one tile of them, the weight decoded as it streams by ---------------------------------------------------------------
//
// A product of tiles takes 16 cycles, but the next one that adds to the same sums must wait for 52: so four blocks have sums side by side.
// A tile can only be loaded when what was stored there has left the store buffer, so tiles are decoded kAhead steps before they are used.

constexpr int kAbreast = 4;
constexpr int64_t kAhead = 3, kRing = 4;

// Tile t of NB blocks, `step` units, into the ring.
template <int BITS, bool INTEGER, int NB>
inline void few_decode(const uint8_t* codes, int64_t block_bytes, int64_t far, int64_t step, const __m512i table, uint8_t* tiles) {
  for (int b = 0; b < NB; ++b, codes += block_bytes, tiles += kRing * kTileBytes) {
    for (int64_t i = 0; i < step * BITS; ++i) __builtin_prefetch(codes + far + 64 * i);
    if constexpr (INTEGER)
      decode_bytes<BITS>(codes, step, tiles);
    else
      decode_floats<BITS>(codes, table, tiles);
  }
}

template <bool INTEGER, int NB>
inline void few_multiply(const uint8_t* x, int64_t x_tile, int64_t x_row, const uint8_t* w0, int64_t w_block, int planes) {
  for (int p = 0; p < planes; ++p, x += x_tile) {
    _tile_loadd(4, x, x_row);
    _tile_loadd(6, w0, 64);
    QJAX_MULTIPLY(0, 4, 6);
    if constexpr (NB > 1) {
      _tile_loadd(7, w0 + w_block, 64);
      QJAX_MULTIPLY(1, 4, 7);
    }
    if constexpr (NB > 2) {
      _tile_loadd(6, w0 + 2 * w_block, 64);
      QJAX_MULTIPLY(2, 4, 6);
    }
    if constexpr (NB > 3) {
      _tile_loadd(7, w0 + 3 * w_block, 64);
      QJAX_MULTIPLY(3, 4, 7);
    }
  }
}

template <int NB>
inline void zero_sums() {
  _tile_zero(0);
  if constexpr (NB > 1) _tile_zero(1);
  if constexpr (NB > 2) _tile_zero(2);
  if constexpr (NB > 3) _tile_zero(3);
}

template <int NB>
inline void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  if constexpr (NB > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (NB > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (NB > 3) _tile_stored(3, sums + 768, 64);
}

template <int BITS, bool INTEGER, int NB>
void few_blocks(const Weight& w, const Rows& r, int64_t block, const __m512i table, uint8_t* tiles, float* acc) {
  constexpr bool kDirect = INTEGER && BITS == 8;  // bytes are tiles as they are
  const int64_t rows = r.count, x_row = INTEGER ? byte_span(w) : 64, step = INTEGER ? x_row / kUnit : 1;
  const int64_t in_group = w.group_padded / kUnit / step, count = w.groups * in_group;
  const int64_t span = INTEGER || in_group < kSpan ? in_group : kSpan;
  const int planes = INTEGER ? 1 : planes_of(r), parts = INTEGER || !stacked(r) ? 1 : parts_of(r);
  const int64_t x_tile = INTEGER ? kTile * x_row : plane_bytes(r), code_bytes = step * BITS * 64, block_bytes = w.block_bytes();
  const uint8_t* x = static_cast<const uint8_t*>(r.data);
  const uint8_t* codes = w.codes + block * block_bytes;
  alignas(64) float sums[2][kAbreast * 256];
  const auto add = [&](int64_t g, bool whole, const float* from) {
    for (int b = 0; b < NB; ++b) {
      if (whole) ask_scales(w, ((block + NB + b) * w.groups + g) * kLanes);
      add_group<INTEGER>(w, r, block + b, g, whole, 0, rows, parts, from + 256 * b, acc + b * rows * kLanes);
    }
  };
  const auto far = [&](int64_t t) {  // beyond the end are the next NB blocks
    constexpr int64_t kFar = 1024;
    return t * code_bytes + kFar < block_bytes ? kFar : kFar + (NB - 1) * block_bytes;
  };
  if constexpr (!kDirect)
    for (int64_t t = 0; t < kAhead && t < count; ++t)
      few_decode<BITS, INTEGER, NB>(codes + t * code_bytes, block_bytes, far(t), step, table, tiles + t % kRing * kTileBytes);
  zero_sums<NB>();
  int64_t g = 0, here = 0, summed = 0, last_g = -1;  // `here`: of the tiles of this group, `summed`: since the sums began
  bool last_whole = false;
  int parity = 0;
  for (int64_t t = 0; t < count; ++t) {
    if constexpr (kDirect) {
      const uint8_t* at = codes + t * code_bytes;
      for (int b = 0; b < NB; ++b)
        for (int64_t i = 0; i < code_bytes; i += 64) __builtin_prefetch(at + b * block_bytes + far(t) + i);
      few_multiply<INTEGER, NB>(x + t * x_tile, x_tile, x_row, at, block_bytes, 1);
    } else {
      few_multiply<INTEGER, NB>(x + t * planes * x_tile, x_tile, x_row, tiles + t % kRing * kTileBytes, kRing * kTileBytes, planes);
      const int64_t next = t + kAhead;
      if (next < count) few_decode<BITS, INTEGER, NB>(codes + next * code_bytes, block_bytes, far(next), step, table, tiles + next % kRing * kTileBytes);
    }
    ++here, ++summed;
    if (here == in_group || summed == span) {
      store_sums<NB>(sums[parity]);
      zero_sums<NB>();
      if (last_g >= 0) add(last_g, last_whole, sums[parity ^ 1]);  // those before, which have arrived
      last_g = g, last_whole = here == summed, parity ^= 1, summed = 0;
      if (here == in_group) ++g, here = 0;
    }
  }
  add(last_g, last_whole, sums[parity ^ 1]);
}

template <int BITS, bool INTEGER>
void few(const Weight& w, const Rows& r, int64_t b0, int64_t b1, float* acc) {
  const int parts = INTEGER || !stacked(r) ? 1 : parts_of(r);
  const __m512i table = float_table(w);
  alignas(64) uint8_t tiles[kAbreast * kRing * kTileBytes];
  configure(int(r.count * parts), INTEGER ? int(byte_span(w)) : 64);
  std::memset(acc, 0, sizeof(float) * (b1 - b0) * r.count * kLanes);
  for (int64_t b = b0; b < b1; b += kAbreast) {
    float* at = acc + (b - b0) * r.count * kLanes;
    switch (b1 - b) {
      case 1: few_blocks<BITS, INTEGER, 1>(w, r, b, table, tiles, at); break;
      case 2: few_blocks<BITS, INTEGER, 2>(w, r, b, table, tiles, at); break;
      case 3: few_blocks<BITS, INTEGER, 3>(w, r, b, table, tiles, at); break;
      default: few_blocks<BITS, INTEGER, 4>(w, r, b, table, tiles, at);
    }
  }
  _tile_release();
}

// ---- many rows: a span of the weight is decoded for all blocks of the task, then two tiles of rows meet two blocks at a time ---------

template <bool INTEGER>
inline void square(const uint8_t* x0, const uint8_t* x1, int64_t x_step, int64_t x_row, const uint8_t* w0, const uint8_t* w1, int64_t w_step, int64_t count, int planes, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t u = 0; u < count; ++u) {
    _tile_loadd(6, w0 + u * w_step, 64);
    _tile_loadd(7, w1 + u * w_step, 64);
    for (int p = 0; p < planes; ++p) {
      _tile_loadd(4, x0 + (u * planes + p) * x_step, x_row);
      QJAX_MULTIPLY(0, 4, 6);
      QJAX_MULTIPLY(1, 4, 7);
      _tile_loadd(5, x1 + (u * planes + p) * x_step, x_row);
      QJAX_MULTIPLY(2, 5, 6);
      QJAX_MULTIPLY(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

template <int BITS, bool INTEGER>
void many(const Weight& w, const Rows& r, int64_t b0, int64_t b1, int64_t r0, int64_t r1, float* acc) {
  const int64_t group_units = w.group_padded / kUnit, rows = r1 - r0, blocks = b1 - b0;
  const int planes = INTEGER ? 1 : planes_of(r);
  const int64_t bytes = INTEGER ? byte_span(w) : 64, step = INTEGER ? bytes / kUnit : 1;  // units in a tile
  // Sums of integers may run over a whole group and must, to be rounded once; floats are added up in spans.
  const int64_t span = INTEGER ? group_units : (group_units < kSpan ? group_units : kSpan);
  const int64_t x_tile = INTEGER ? kTile * bytes : kTileBytes, w_tile = INTEGER ? 16 * bytes : kTileBytes;
  const int64_t x_all = INTEGER ? kTile * w.k_padded() : w.units() * planes * kTileBytes;  // bytes of a tile of rows
  const uint8_t* x = static_cast<const uint8_t*>(r.data);
  const __m512i table = float_table(w);
  constexpr bool kDirect = INTEGER && BITS == 8;
  const size_t size = kDirect ? 64 : size_t(blocks) * (span / step) * w_tile;
  uint8_t* raw = static_cast<uint8_t*>(::operator new(size + 64));
  uint8_t* decoded = raw + (64 - reinterpret_cast<uintptr_t>(raw) % 64) % 64;
  alignas(64) float sums[4][256];
  configure(16, int(bytes));
  std::memset(acc, 0, sizeof(float) * blocks * rows * kLanes);
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t first = 0; first < group_units; first += span) {
      const int64_t n = group_units - first < span ? group_units - first : span, unit0 = g * group_units + first;
      const int64_t per_block = (span / step) * w_tile;
      if constexpr (!kDirect)
        for (int64_t b = 0; b < blocks; ++b) {
          const uint8_t* codes = w.codes + (b0 + b) * w.block_bytes() + unit0 * BITS * 64;
          for (int64_t u = 0; u < n; u += step) {
            if constexpr (INTEGER)
              decode_bytes<BITS>(codes + u * BITS * 64, step, decoded + b * per_block + u / step * w_tile);
            else
              decode_floats<BITS>(codes + u * BITS * 64, table, decoded + b * per_block + u * w_tile);
          }
        }
      for (int64_t m = r0; m < r1; m += 2 * kTile) {
        const uint8_t* x0 = x + (m / kTile) * x_all + unit0 / step * planes * x_tile;
        const int64_t here = r1 - m < kTile ? r1 - m : kTile, next = r1 - m - here < kTile ? r1 - m - here : kTile;
        const uint8_t* x1 = next > 0 ? x0 + x_all : x0;
        for (int64_t b = 0; b < blocks; b += 2) {
          const int64_t other = b + 1 < blocks ? b + 1 : b;
          const uint8_t *w0, *w1;
          if constexpr (kDirect) {
            w0 = w.codes + (b0 + b) * w.block_bytes() + unit0 * BITS * 64;
            w1 = w.codes + (b0 + other) * w.block_bytes() + unit0 * BITS * 64;
          } else {
            w0 = decoded + b * per_block;
            w1 = decoded + other * per_block;
          }
          square<INTEGER>(x0, x1, x_tile, bytes, w0, w1, w_tile, n / step, planes, sums[0]);
          for (int i = 0; i < 4; ++i) {
            const int64_t block = i & 1 ? b + 1 : b, count = i & 2 ? next : here, at = m + (i & 2 ? kTile : 0);
            if (block < blocks && count > 0)
              add_group<INTEGER>(w, r, b0 + block, g, first == 0, at, count, 1, sums[i], acc + (block * rows + at - r0) * kLanes);
          }
        }
      }
    }
  _tile_release();
  ::operator delete(raw);
}

template <int BITS>
void amx_bits(const Weight& w, const Rows& r, int64_t b0, int64_t b1, int64_t r0, int64_t r1, float* acc) {
  if (r.integer)
    r.count <= kTile ? few<BITS, true>(w, r, b0, b1, acc) : many<BITS, true>(w, r, b0, b1, r0, r1, acc);
  else
    r.count <= kTile ? few<BITS, false>(w, r, b0, b1, acc) : many<BITS, false>(w, r, b0, b1, r0, r1, acc);
}

void amx_run(const Weight& w, const Rows& r, int64_t b0, int64_t b1, int64_t r0, int64_t r1, float* acc) {
  if (without_tiles(w, r)) return avx512_vnni()->run(w, r, b0, b1, r0, r1, acc);
  switch (w.bits) {
    case 2: return amx_bits<2>(w, r, b0, b1, r0, r1, acc);
    case 3: return amx_bits<3>(w, r, b0, b1, r0, r1, acc);
    case 4: return amx_bits<4>(w, r, b0, b1, r0, r1, acc);
    default: return amx_bits<8>(w, r, b0, b1, r0, r1, acc);
  }
}

}  // namespace

namespace qjax_cpu {
const Isa* amx() {
  static const Isa isa{"amx", kTile, amx_size, amx_prepare, amx_run};
  return &isa;
}
}  // namespace qjax_cpu
#else
#include "common.h"
namespace qjax_cpu {
const Isa* amx() { return nullptr; }
}  // namespace qjax_cpu
#endif
