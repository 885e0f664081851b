// SPDX-License-Identifier: BSD-3-Clause
// Every kernel without Python: prints the code path, then a line for each call with a hash of all that it wrote, so that
// two systems can be compared. Ends with 1 where a number of threads, or memory that comes back, changes a bit.
#include "cpu/kernels.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/memory.h"
#include "cpu/threads.h"

using namespace nf;

namespace {

uint64_t state = 1;
double number() {  // nearly normal, one in a hundred far away
  double sum = -2;
  for (int i = 0; i < 4; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    sum += double(state >> 11) * 0x1p-53;
  }
  return state >> 58 == 0 ? 9 * sum : sum;
}

template <class T> std::vector<T> numbers(int64_t n, double mean) {
  std::vector<T> all(static_cast<size_t>(n));
  for (T& v : all) v = Cast<T>::from(static_cast<typename TypeOf<T>::compute>(number() + mean));
  return all;
}

class Hash {
 public:
  template <class T> void add(const std::vector<T>& v) { add(v.data(), v.size() * sizeof(T)); }
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) sum_ = (sum_ ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  }
  uint64_t sum() const { return sum_; }

 private:
  uint64_t sum_ = 14695981039346656037u;
};

void check(bool good) {
  if (!good) std::puts("no memory"), std::exit(1);
}

// y or dx as the bindings allocate it: large ones from the pool.
template <class T> struct Result {
  int64_t n;
  bool large;
  T* p;
  Result(int64_t n_, const T* like)
      : n(n_),
        large(size_t(n) * sizeof(T) >= pool_threshold),
        p(static_cast<T*>(large ? pool_alloc(size_t(n) * sizeof(T), like) : std::malloc(size_t(n) * sizeof(T)))) {
    check(p != nullptr);
  }
  ~Result() { large ? pool_free(p) : std::free(p); }
};

template <class T> struct Data {
  using C = typename TypeOf<T>::compute;
  using S = typename TypeOf<T>::stat;
  std::vector<T> x, dy;
  std::vector<C> weight, bias, dweight, dbias;
  std::vector<S> mean, rstd;
  Data(int64_t cells, int64_t stats, int64_t parameters)
      : x(numbers<T>(cells, 0.7)),
        dy(numbers<T>(cells, 0.05)),
        weight(numbers<C>(parameters, 1)),
        bias(numbers<C>(parameters, 0.1)),
        dweight(weight.size()),
        dbias(weight.size()),
        mean(static_cast<size_t>(stats)),
        rstd(mean.size()) {}
};

template <class T> constexpr DType dtype_of = DType::f64;
template <> constexpr DType dtype_of<float> = DType::f32;
template <> constexpr DType dtype_of<f16> = DType::f16;
template <> constexpr DType dtype_of<bf16> = DType::bf16;

template <class T> uint64_t rows(const Rows& g, bool center) {
  const int64_t cells = g.count * g.channels * g.span, parameters = g.channels * g.period;
  const int type = int(dtype_of<T>);
  state = 1;
  Data<T> d(cells, g.count, parameters);
  Result<T> y(cells, d.x.data()), dx(cells, d.x.data());
  const void* bias = center ? d.bias.data() : nullptr;
  void *mean = center ? d.mean.data() : nullptr, *dbias = center ? d.dbias.data() : nullptr;
  const RowsForward forward{g, d.x.data(), y.p, d.weight.data(), bias, mean, d.rstd.data(), 1e-5, center};
  check(kernels().rows_forward[type](forward));
  const DType gradient = type == int(DType::f64) ? DType::f64 : DType::f32;
  const RowsBackward backward{g,    d.dy.data(),      d.x.data(), mean,     d.rstd.data(), d.weight.data(),
                              dx.p, d.dweight.data(), dbias,      gradient, center};
  check(kernels().rows_backward[type](backward));
  Hash h;
  h.add(y.p, size_t(cells) * sizeof(T)), h.add(d.mean), h.add(d.rstd);
  h.add(dx.p, size_t(cells) * sizeof(T)), h.add(d.dweight), h.add(d.dbias);
  return h.sum();
}

template <class T> uint64_t columns(const Columns& g, bool center) {
  const int64_t cells = g.batch * g.outer * g.channels * g.span, stats = g.batch * g.channels;
  const int64_t parameters = g.param_span == 0 ? g.outer : g.channels * g.span / g.param_span;
  const int type = int(dtype_of<T>);
  state = 1;
  Data<T> d(cells, stats, parameters);
  Result<T> y(cells, d.x.data()), dx(cells, d.x.data()), z(cells, d.x.data());
  std::vector<double> batch_mean(d.mean.size()), batch_var(batch_mean), found(batch_mean);
  const ColumnsForward forward{g,
                               d.x.data(),
                               y.p,
                               d.weight.data(),
                               d.bias.data(),
                               d.mean.data(),
                               d.rstd.data(),
                               batch_mean.data(),
                               batch_var.data(),
                               1e-5,
                               center};
  check(kernels().columns_forward[type](forward));
  const DType gradient = type == int(DType::f64) ? DType::f64 : DType::f32;
  const ColumnsBackward backward{g,    d.dy.data(),      d.x.data(),     d.mean.data(), d.rstd.data(), d.weight.data(),
                                 dx.p, d.dweight.data(), d.dbias.data(), gradient,      center,        false};
  check(kernels().columns_backward[type](backward));
  Hash h;
  h.add(y.p, size_t(cells) * sizeof(T)), h.add(d.mean), h.add(d.rstd), h.add(batch_mean), h.add(batch_var);
  h.add(dx.p, size_t(cells) * sizeof(T)), h.add(d.dweight), h.add(d.dbias);
  if (g.batch == 1 && g.any_order) {
    const AffineMap map{
        g, d.x.data(), z.p, batch_mean.data(), batch_var.data(), 1e-5, found.data(), d.weight.data(), d.bias.data()};
    check(kernels().affine[type](map));
    h.add(z.p, size_t(cells) * sizeof(T)), h.add(found);
  }
  return h.sum();
}

bool all_good = true;

template <class F> void report(const char* what, DType type, F run) {
  static const char* const names[] = {"float64", "float32", "float16", "bfloat16"};
  uint64_t first = 0;
  for (const int threads : {1, 2, 5}) {
    set_threads(threads);
    const uint64_t h = run();
    if (threads == 1) first = h;
    all_good = all_good && h == first;
  }
  std::printf("%s %s %016llx\n", what, names[int(type)], static_cast<unsigned long long>(first));
}

template <class T> void everything() {
  const DType type = dtype_of<T>;
  char what[96];
  for (const Rows& g : {Rows{37, 67, 1, 1}, Rows{4099, 257, 1, 1}, Rows{3, 340'007, 1, 1}, Rows{20'011, 16, 1, 1},
                        Rows{60, 4, 93, 6}, Rows{133, 1, 7743, 19}, Rows{16'411, 1024, 1, 1}})
    for (const bool center : {true, false}) {
      std::snprintf(what, sizeof what, "rows %lldx%lldx%lld period %lld %s", static_cast<long long>(g.count),
                    static_cast<long long>(g.channels), static_cast<long long>(g.span),
                    static_cast<long long>(g.period), center ? "centred" : "rms");
      report(what, type, [&] { return rows<T>(g, center); });
    }
  for (const Columns& g :
       {Columns{1, 7, 19, 7743, 7743, true}, Columns{1, 54'201, 19, 1, 1, true}, Columns{1, 20'011, 100, 1, 1, true},
        Columns{7, 7743, 19, 1, 1, false}, Columns{5, 8463, 6, 4, 1, false}, Columns{61, 131, 129, 1, 0, false}}) {
    std::snprintf(what, sizeof what, "columns %lldx%lldx%lldx%lld", static_cast<long long>(g.batch),
                  static_cast<long long>(g.outer), static_cast<long long>(g.channels), static_cast<long long>(g.span));
    report(what, type, [&] { return columns<T>(g, true); });
  }
}

}  // namespace

int main() {
  if (const char* refused = choose_kernels()) return std::puts(refused), 1;
  const CacheSizes& c = cache_sizes();
  if (c.l1 == 0 || c.l2 < c.l1 || c.last < c.l2 || pool_limit() == 0 || get_threads() < 1) return std::puts("facts"), 1;
  std::printf("%s\n", kernels().name);
  everything<double>();
  everything<float>();
  everything<f16>();
  everything<bf16>();
  if (pool_held() == 0) return std::puts("nothing came back to the pool"), 1;
  pool_release();
  if (pool_held() != 0) return std::puts("the pool keeps what it released"), 1;
  return all_good ? 0 : (std::puts("threads change bits"), 1);
}
