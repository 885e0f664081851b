// SPDX-License-Identifier: BSD-3-Clause
// Copies between arrays of any strides, converting: what the other kernels do not take as it lies. A thread for each
// cell, neighbours along the last axis; read and written once.
#include "warp.cuh"

namespace nf::cuda {
namespace {

struct Copy {
  int nd;
  int64_t cells;
  Divider by[max_dims];
  int64_t dims[max_dims], from_strides[max_dims], to_strides[max_dims];
  const char* from;
  char* to;
};

template <class From, class To> __device__ __forceinline__ To converted(From v) {
  if constexpr (sizeof(From) == sizeof(To) && (std::is_same_v<From, To>)) return v;
  else if constexpr (std::is_same_v<From, f16> || std::is_same_v<From, bf16>) return Cast<To>::from(double(to_f32(v)));
  else return Cast<To>::from(static_cast<double>(v));
}

template <class From, class To> __global__ void __launch_bounds__(256) copy_all(const __grid_constant__ Copy f) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t cell = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; cell < f.cells; cell += step) {
    int64_t rest = cell, from = 0, to = 0;
    for (int axis = f.nd - 1; axis >= 0; --axis) {
      const int64_t next = f.by[axis].divide(rest), i = rest - next * f.dims[axis];
      from += i * f.from_strides[axis], to += i * f.to_strides[axis];
      rest = next;
    }
    *reinterpret_cast<To*>(f.to + to) = converted<From, To>(*reinterpret_cast<const From*>(f.from + from));
  }
}

template <class From, class To> int copy_as(const CopyCells& a, const Copy& f) {
  const int64_t blocks = ceil_div(f.cells, 256);
  return launch(copy_all<From, To>, Shape{dim3(unsigned(blocks < 1 << 20 ? blocks : 1 << 20)), 256, 1, 0, a.stream}, f);
}
template <class From> int copy_from(const CopyCells& a, const Copy& f) {
  return with_type(a.to_type, [&](auto t) { return copy_as<From, decltype(t)>(a, f); });
}
// Whole numbers are computed as float64, as everywhere in NumPy.
constexpr int not_supported = 801;  // cudaErrorNotSupported
template <class From> int copy_whole(const CopyCells& a, const Copy& f) {
  return a.to_type == DType::f64 ? copy_as<From, double>(a, f) : not_supported;
}

}  // namespace

int copy_cells(const CopyCells& a) {
  Copy f{};
  f.nd = a.nd, f.cells = 1;
  for (int i = 0; i < a.nd; ++i) f.cells *= a.dims[i];
  if (f.cells == 0) return 0;
  for (int i = 0; i < a.nd; ++i) {
    f.dims[i] = a.dims[i], f.from_strides[i] = a.from_strides[i], f.to_strides[i] = a.to_strides[i];
    f.by[i] = Divider(a.dims[i], f.cells);
  }
  f.from = static_cast<const char*>(a.from), f.to = static_cast<char*>(a.to);
  switch (a.from_type) {
    case CellType::f64: return copy_from<double>(a, f);
    case CellType::f32: return copy_from<float>(a, f);
    case CellType::f16: return copy_from<f16>(a, f);
    case CellType::bf16: return copy_from<bf16>(a, f);
    case CellType::i8: return copy_whole<int8_t>(a, f);
    case CellType::i16: return copy_whole<int16_t>(a, f);
    case CellType::i32: return copy_whole<int32_t>(a, f);
    case CellType::i64: return copy_whole<int64_t>(a, f);
    case CellType::u8: return copy_whole<uint8_t>(a, f);
    case CellType::u16: return copy_whole<uint16_t>(a, f);
    case CellType::u32: return copy_whole<uint32_t>(a, f);
    case CellType::u64: return copy_whole<uint64_t>(a, f);
    default: return copy_whole<bool>(a, f);
  }
}

}  // namespace nf::cuda
