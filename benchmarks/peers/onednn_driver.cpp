// One oneDNN primitive behind a C interface: create, point at memory, run n times, destroy.
//
// Scale, shift and statistics are float32, as oneDNN has them for every dtype of the data. RMS norm is its layer
// normalization with the flag of that name; instance norm is its group normalization with one channel per group.

#include <oneapi/dnnl/dnnl.hpp>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using dnnl::memory;
using dnnl::normalization_flags;
using dnnl::prop_kind;
using tag = memory::format_tag;

struct Runtime {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
};

Runtime& runtime() {
  static Runtime r;
  return r;
}

struct Run {
  dnnl::primitive primitive;
  std::unordered_map<int, memory> arguments;
  std::string implementation;
};

memory::data_type dtype_of(const std::string& name) {
  if (name == "float32") return memory::data_type::f32;
  if (name == "bfloat16") return memory::data_type::bf16;
  if (name == "float16") return memory::data_type::f16;
  throw std::runtime_error("no dtype " + name);
}

memory::desc data_desc(const memory::dims& dims, memory::data_type dtype, bool channels_last) {
  static const tag first[] = {tag::a, tag::ab, tag::abc, tag::abcd, tag::abcde};
  static const tag last[] = {tag::a, tag::ab, tag::acb, tag::acdb, tag::acdeb};
  return {dims, dtype, (channels_last ? last : first)[dims.size() - 1]};
}

memory::desc dense(memory::dims dims) {
  memory::dims strides(dims.size(), 1);
  for (size_t i = dims.size(); i-- > 1;) strides[i - 1] = strides[i] * dims[i];
  return {dims, memory::data_type::f32, strides};
}

// Binds the primitive to the arguments of its pass; pointers come later.
template <class Descriptor>
Run finish(const Descriptor& pd, dnnl::primitive primitive, const std::vector<std::pair<int, memory::desc>>& descs) {
  Run run{std::move(primitive), {}, pd.impl_info_str()};
  for (const auto& [slot, desc] : descs) run.arguments.emplace(slot, memory(desc, runtime().engine, nullptr));
  return run;
}

struct Request {
  std::string op;
  memory::desc data, parameters, statistics;
  memory::dim groups;
  float eps;
  bool has(const char* part) const { return op.find(part) != std::string::npos; }
};

using Descs = std::vector<std::pair<int, memory::desc>>;

Descs forward_descs(const Request& r, bool bias, bool given_statistics) {
  Descs d{{DNNL_ARG_SRC, r.data}, {DNNL_ARG_DST, r.data}, {DNNL_ARG_SCALE, r.parameters}};
  if (bias) d.push_back({DNNL_ARG_SHIFT, r.parameters});
  if (given_statistics) {
    d.push_back({DNNL_ARG_MEAN, r.statistics});
    d.push_back({DNNL_ARG_VARIANCE, r.statistics});
  }
  return d;
}

Descs backward_descs(const Request& r, bool bias) {
  Descs d{{DNNL_ARG_SRC, r.data},           {DNNL_ARG_DIFF_DST, r.data},         {DNNL_ARG_DIFF_SRC, r.data},
          {DNNL_ARG_SCALE, r.parameters},   {DNNL_ARG_DIFF_SCALE, r.parameters}, {DNNL_ARG_MEAN, r.statistics},
          {DNNL_ARG_VARIANCE, r.statistics}};
  if (bias) d.push_back({DNNL_ARG_DIFF_SHIFT, r.parameters});
  return d;
}

// The three primitives share the order of their arguments, but for the groups.
template <class Forward, class Backward, class... Groups>
Run make(const Request& r, normalization_flags flags, bool bias, Groups... groups) {
  const auto& engine = runtime().engine;
  const bool fixed = r.has("_eval");
  if (fixed) flags = flags | normalization_flags::use_global_stats;
  if (!r.has("_backward")) {
    typename Forward::primitive_desc pd(engine, prop_kind::forward_inference, r.data, r.data, groups..., r.eps, flags);
    return finish(pd, Forward(pd), forward_descs(r, bias, fixed));
  }
  typename Forward::primitive_desc hint(engine, prop_kind::forward_training, r.data, r.data, groups..., r.eps, flags);
  typename Backward::primitive_desc pd(engine, prop_kind::backward, r.data, r.data, r.data, groups..., r.eps, flags,
                                       hint);
  return finish(pd, Backward(pd), backward_descs(r, bias));
}

Run make_layer(const Request& r, normalization_flags flags, bool bias) {
  const auto& engine = runtime().engine;
  using Forward = dnnl::layer_normalization_forward;
  using Backward = dnnl::layer_normalization_backward;
  if (!r.has("_backward")) {
    Forward::primitive_desc pd(engine, prop_kind::forward_inference, r.data, r.data, r.statistics, r.eps, flags);
    return finish(pd, Forward(pd), forward_descs(r, bias, false));
  }
  Forward::primitive_desc hint(engine, prop_kind::forward_training, r.data, r.data, r.statistics, r.eps, flags);
  Backward::primitive_desc pd(engine, prop_kind::backward, r.data, r.data, r.data, r.statistics, r.eps, flags, hint);
  return finish(pd, Backward(pd), backward_descs(r, bias));
}

Run create(const Request& r) {
  const auto scale = normalization_flags::use_scale;
  const auto affine = scale | normalization_flags::use_shift;
  if (r.has("rms_norm")) return make_layer(r, scale | normalization_flags::rms_norm, false);
  if (r.has("layer_norm")) return make_layer(r, affine, true);
  if (r.has("batch_norm"))
    return make<dnnl::batch_normalization_forward, dnnl::batch_normalization_backward>(r, affine, true);
  return make<dnnl::group_normalization_forward, dnnl::group_normalization_backward>(r, affine, true, r.groups);
}

template <class F> int guarded(char* message, size_t room, F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(message, room, "%s", e.what());
  }
  return 1;
}

}  // namespace

extern "C" {

// dims are those of the data in oneDNN's order (channels second), whatever the layout.
int driver_create(const char* op, const char* dtype, int ndims, const int64_t* dims, int channels_last, int64_t groups,
                  float eps, void** handle, char* message, size_t room) {
  return guarded(message, room, [&] {
    Request r;
    r.op = op;
    memory::dims shape(dims, dims + ndims);
    r.data = data_desc(shape, dtype_of(dtype), channels_last);
    const bool rows = r.has("layer_norm") || r.has("rms_norm");
    r.parameters = dense({rows ? shape.back() : shape[1]});
    if (rows) {
      r.statistics = dense({shape.begin(), shape.end() - 1});
    } else if (r.has("batch_norm")) {
      r.statistics = dense({shape[1]});
    } else {
      r.statistics = dense({shape[0], groups});
    }
    r.groups = groups;
    r.eps = eps;
    *handle = new Run(create(r));
  });
}

// Arguments that this primitive does not have are ignored.
int driver_point(void* handle, const char* name, void* data, char* message, size_t room) {
  return guarded(message, room, [&] {
    static const std::unordered_map<std::string, int> slots{{"src", DNNL_ARG_SRC},
                                                            {"dst", DNNL_ARG_DST},
                                                            {"mean", DNNL_ARG_MEAN},
                                                            {"variance", DNNL_ARG_VARIANCE},
                                                            {"scale", DNNL_ARG_SCALE},
                                                            {"shift", DNNL_ARG_SHIFT},
                                                            {"diff_src", DNNL_ARG_DIFF_SRC},
                                                            {"diff_dst", DNNL_ARG_DIFF_DST},
                                                            {"diff_scale", DNNL_ARG_DIFF_SCALE},
                                                            {"diff_shift", DNNL_ARG_DIFF_SHIFT}};
    auto& arguments = static_cast<Run*>(handle)->arguments;
    auto at = arguments.find(slots.at(name));
    if (at != arguments.end()) at->second.set_data_handle(data);
  });
}

// Submits n executions and waits once, as a network of n layers would.
int driver_run(void* handle, int64_t n, char* message, size_t room) {
  return guarded(message, room, [&] {
    auto* run = static_cast<Run*>(handle);
    for (int64_t i = 0; i < n; ++i) run->primitive.execute(runtime().stream, run->arguments);
    runtime().stream.wait();
  });
}

const char* driver_implementation(void* handle) { return static_cast<Run*>(handle)->implementation.c_str(); }

void driver_destroy(void* handle) { delete static_cast<Run*>(handle); }

const char* driver_version() {
  static char text[48];
  const auto* v = dnnl_version();
  std::snprintf(text, sizeof text, "%d.%d.%d", v->major, v->minor, v->patch);
  return text;
}

}  // extern "C"
