// SPDX-License-Identifier: BSD-3-Clause
// Affine: y = (x - mean)*rstd*weight + bias with given statistics per channel, i.e. batch norm in evaluation.
//
//   traffic    x is read once, y is written once: 2 s bytes per cell of size s
#include "columns.h"

namespace nf {
namespace {

template <class T> struct Evaluation {
  ForwardMap<T> map;
  int64_t rows_at_once;  // rows of the matrix that one piece takes
  int64_t tile, tiles;   // columns that go down the rows together
};

template <class T> void evaluate(void* context, int64_t begin, int64_t end, int) {
  const Evaluation<T>& e = *static_cast<const Evaluation<T>*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = i / e.tiles * e.rows_at_once, to = smaller(from + e.rows_at_once, e.map.g.outer);
    const int64_t c0 = i % e.tiles * e.tile;
    ForwardMap<T> tile = e.map;
    tile.first = c0 / tile.g.span;
    tile.tile = smaller(e.tile, tile.g.channels * tile.g.span - c0);
    tile.mean += tile.first, tile.rstd += tile.first;
    const int64_t at = entry(tile.g, c0);
    tile.hi += at, tile.s += at, tile.t += at;
    map_unit(tile, from, to, c0, 0);
  }
}

// A loop that compilers turn into vectors.
__attribute__((noinline)) void find_rstd(int64_t n, const double* __restrict var, double eps, double* __restrict rstd) {
  for (int64_t i = 0; i < n; ++i) rstd[i] = rstd_given(var[i], eps);
}

template <class T> bool affine_map(const AffineMap& a) {
  using C = typename TypeOf<T>::compute;
  const Columns& g = a.g;
  find_rstd(g.channels, a.var, a.eps, a.rstd);
  if (g.outer * g.span == 0) return true;
  const int64_t width = g.channels * g.span, repeats = table_repeats<C>(g, width, width);
  const int64_t entries = padded64(entry(g, width) * repeats);
  const int64_t bytes = g.outer * width * int64_t(sizeof(T));
  Work<C> tables(3 * entries);
  if (tables.failed()) return false;
  Evaluation<T> e{};
  ForwardMap<T>& f = e.map;
  f.g = g;
  f.x = static_cast<const T*>(a.x), f.y = static_cast<T*>(a.y);
  f.w = static_cast<const C*>(a.weight), f.b = static_cast<const C*>(a.bias);
  f.mean = a.mean, f.rstd = a.rstd;
  f.hi = tables.p, f.s = f.hi + entries, f.t = f.s + entries;
  f.tile = width, f.repeats = repeats;
  f.center = true;
  f.extreme = any_extreme<C>(f.mean, f.rstd, g.channels, false);
  f.streaming = use_streaming(size_t(2 * bytes)) && streamable(f.y);
  build_tables(f);
  e.tile = width, e.tiles = 1;
  // Tables cell by cell must stay in the first-level cache; runs are walked through as they lie in memory.
  int64_t tile = in_runs(g) ? 32768 : 1536;
  const int threads = threads_for(bytes);
  if (threads > 1) tile = smaller(tile, larger(4096, g.outer * width / (4 * threads)));
  if (width > 2 * tile) {
    e.tile = larger(1, tile / g.span) * g.span;
    if (e.tile / g.span >= 16) e.tile = e.tile / g.span / 16 * 16 * g.span;
    e.tiles = ceil_div(width, e.tile);
  }
  e.rows_at_once = map_rows(e.tile * int64_t(sizeof(T)), repeats, piece_bytes(bytes, threads));
  const int64_t pieces = ceil_div(g.outer, e.rows_at_once) * e.tiles;
  parallel_for(pieces, threads == 1 ? pieces : 1, evaluate<T>, &e, threads);
  return true;
}

}  // namespace

void NF_NAME(fill_affine)(Kernels& k) {
  k.affine[int(DType::f64)] = affine_map<double>;
  k.affine[int(DType::f32)] = affine_map<float>;
  k.affine[int(DType::f16)] = affine_map<f16>;
  k.affine[int(DType::bf16)] = affine_map<bf16>;
}

}  // namespace nf
