/* The products on x86: AVX2, AVX-VNNI, AVX512-VNNI, AMX. */

#include <cpuid.h>
#include <immintrin.h>

#if __has_include(<avxvnniintrin.h>)
#define HAS_AVX_VNNI 1
#endif
#if __has_include(<amxint8intrin.h>) && defined(__linux__)
#define HAS_AMX 1
#endif
#if HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* AVX2. Of one sign and at most 127, two products of bytes are at most 32,258: the 16-bit sums, which would
   saturate, never do. */
#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define FLIP 0
#define SHAPES(X, ...) X(6, 1, __VA_ARGS__) X(3, 2, __VA_ARGS__) X(2, 2, __VA_ARGS__) X(1, 4, __VA_ARGS__)
#define ALL(f) _mm256_set1_ps(f)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define DOT(sum, x, w) ((avx2_ints)_mm256_add_epi32((__m256i)(sum), avx2_dot(x, (__m256i)(w))))
INLINE TARGET __m256i avx2_dot(int32_t x, __m256i w) {
  __m256i xs = _mm256_set1_epi32(x);
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(xs), _mm256_sign_epi8(w, xs));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#include "panels.h"
#undef NAME
#undef TARGET
#undef FLIP
#undef DOT

/* AVX-VNNI: as AVX2, with the whole sum in one instruction. */
#define NAME(x) avx_vnni_##x
#if HAS_AVX_VNNI
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define FLIP 0x80
#define DOT(sum, x, w) \
  ((avx_vnni_ints)_mm256_dpbusd_avx_epi32((__m256i)(sum), _mm256_set1_epi32(x), (__m256i)(w)))
#include "panels.h"
#undef TARGET
#undef FLIP
#undef DOT
#else
#define avx_vnni_quantise avx2_quantise
#define avx_vnni_int8_panels avx2_int8_panels
#define avx_vnni_fp32_panels avx2_fp32_panels
#endif
#undef NAME
#undef LANES
#undef SHAPES
#undef ALL
#undef FMA

#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define LANES 16
#define FLIP 0x80
#define SHAPES(X, ...)                                                                           \
  X(12, 2, __VA_ARGS__)                                                                          \
  X(6, 4, __VA_ARGS__) X(4, 4, __VA_ARGS__) X(3, 4, __VA_ARGS__) X(2, 8, __VA_ARGS__) X(1, 8, __VA_ARGS__)
#define ALL(f) _mm512_set1_ps(f)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define DOT(sum, x, w) \
  ((avx512_ints)_mm512_dpbusd_epi32((__m512i)(sum), _mm512_set1_epi32(x), (__m512i)(w)))
#include "panels.h"

#if HAS_AMX
#undef TARGET
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")))

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} Tiles __attribute__((aligned(64)));

/* Tiles 0 to 1 hold rows of x (as many as `rows`), 2 to 3 weights, 4 to 7 sums. */
static TARGET void amx_configure(int rows) {
  Tiles tiles = {.palette = 1};
  for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = i == 2 || i == 3 ? 16 : rows;
  _tile_loadconfig(&tiles);
}

static TARGET void amx_put(const Matrix *m, const Quantised *q, const int32_t *sums, int64_t width, float *y,
                           int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t p = 0; p < panels; p++)
      avx512_put_sums(m, *(const avx512_ints *)(sums + r * width + p * PANEL), q->scale[row + r], y, row + r,
                      (panel + p) * PANEL, 0);
}

/* 32 rows by 2 panels; only `rows` of the rows are stored. */
static TARGET void amx_square(const Matrix *m, const Quantised *q, float *y, int64_t row, int64_t rows,
                              int64_t panel) {
  const int8_t *x = q->values + row * m->depth, *w = (const int8_t *)m->packed + panel * m->depth * PANEL;
  int64_t x_next = 16 * m->depth, w_next = PANEL * m->depth;
  int32_t sums[32 * 32] __attribute__((aligned(64)));
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t k = 0; k < m->depth; k += 64) {
    _tile_loadd(0, x + k, m->depth);
    _tile_loadd(2, w + k * PANEL, 64);
    _tile_dpbssd(4, 0, 2);
    _tile_loadd(3, w + w_next + k * PANEL, 64);
    _tile_dpbssd(5, 0, 3);
    _tile_loadd(1, x + x_next + k, m->depth);
    _tile_dpbssd(6, 1, 2);
    _tile_dpbssd(7, 1, 3);
  }
  _tile_stored(4, sums, 128);
  _tile_stored(5, sums + 16, 128);
  _tile_stored(6, sums + 16 * 32, 128);
  _tile_stored(7, sums + 16 * 32 + 16, 128);
  amx_put(m, q, sums, 32, y, row, rows, panel, 2);
}

/* Up to 16 rows by 4 panels. */
static TARGET void amx_strip(const Matrix *m, const Quantised *q, float *y, int64_t row, int64_t rows,
                             int64_t panel) {
  const int8_t *x = q->values + row * m->depth, *w = (const int8_t *)m->packed + panel * m->depth * PANEL;
  int64_t w_next = PANEL * m->depth;
  int32_t sums[16 * 64] __attribute__((aligned(64)));
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t k = 0; k < m->depth; k += 64) {
    _tile_loadd(0, x + k, m->depth);
    _tile_loadd(2, w + k * PANEL, 64);
    _tile_dpbssd(4, 0, 2);
    _tile_loadd(3, w + w_next + k * PANEL, 64);
    _tile_dpbssd(5, 0, 3);
    _tile_loadd(2, w + 2 * w_next + k * PANEL, 64);
    _tile_dpbssd(6, 0, 2);
    _tile_loadd(3, w + 3 * w_next + k * PANEL, 64);
    _tile_dpbssd(7, 0, 3);
  }
  _tile_stored(4, sums, 256);
  _tile_stored(5, sums + 16, 256);
  _tile_stored(6, sums + 32, 256);
  _tile_stored(7, sums + 48, 256);
  amx_put(m, q, sums, 64, y, row, rows, panel, 4);
}

/* Up to 16 rows by 1 panel. */
static TARGET void amx_single(const Matrix *m, const Quantised *q, float *y, int64_t row, int64_t rows,
                              int64_t panel) {
  const int8_t *x = q->values + row * m->depth, *w = (const int8_t *)m->packed + panel * m->depth * PANEL;
  int32_t sums[16 * 16] __attribute__((aligned(64)));
  _tile_zero(4);
  for (int64_t k = 0; k < m->depth; k += 64) {
    _tile_loadd(0, x + k, m->depth);
    _tile_loadd(2, w + k * PANEL, 64);
    _tile_dpbssd(4, 0, 2);
  }
  _tile_stored(4, sums, 64);
  amx_put(m, q, sums, 16, y, row, rows, panel, 1);
}

static TARGET void amx_panels(const Matrix *m, const Quantised *q, int64_t rows, float *y, int64_t from,
                              int64_t to) {
  int64_t row = 0, panel;
  if (rows > 16) amx_configure(16);
  for (; rows - row > 16; row += 32) {
    int64_t wanted = rows - row < 32 ? rows - row : 32;
    for (panel = from; panel + 2 <= to; panel += 2) amx_square(m, q, y, row, wanted, panel);
    if (panel < to) {
      amx_single(m, q, y, row, 16, panel);
      amx_single(m, q, y, row + 16, wanted - 16, panel);
    }
  }
  if (row < rows) {
    amx_configure(rows - row);
    for (panel = from; panel + 4 <= to; panel += 4) amx_strip(m, q, y, row, rows - row, panel);
    for (; panel < to; panel++) amx_single(m, q, y, row, rows - row, panel);
  }
  _tile_release();
}

/* Linux gives the tiles to processes that ask. */
static int amx_granted(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  unsigned a, b, c, d;
  int has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3; /* AMX-TILE, AMX-INT8 */
  return has && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}
#else
#define amx_panels avx512_int8_panels
static int amx_granted(void) { return 0; }
#endif

static int x86_processors(void) {
  unsigned a, b, c, d;
  int found = 0;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
  found |= 1 << AVX2;
#if HAS_AVX_VNNI
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1) found |= 1 << AVX_VNNI;
#endif
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    found |= 1 << AVX512_VNNI;
    if (amx_granted()) found |= 1 << AMX;
  }
  return found;
}
