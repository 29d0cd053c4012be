// The Python module hlip_kernels._C: raw addresses and a stream handle in, exceptions out. It links neither torch nor
// libcuda, so one build serves every torch, and importing it needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;
using namespace hlip;

#ifndef HLIP_ARCHITECTURES
#define HLIP_ARCHITECTURES ""
#endif
#ifndef HLIP_NVCC_VERSION
#define HLIP_NVCC_VERSION ""
#endif

namespace {

// Calls run(std::integral_constant<int, D>) for a head dim there are kernels for.
template <typename Run>
void with_head_dim(int head_dim, Run run) {
  switch (head_dim) {
    case 32: return run(std::integral_constant<int, 32>{});
    case 64: return run(std::integral_constant<int, 64>{});
    case 80: return run(std::integral_constant<int, 80>{});
    case 96: return run(std::integral_constant<int, 96>{});
    case 128: return run(std::integral_constant<int, 128>{});
    default: throw std::runtime_error("hlip: short-segment attention has no kernel for head dim " + std::to_string(head_dim));
  }
}

void short_attention_forward(Target target, Type type, int head_dim, View q, View k, View v, uintptr_t out, uintptr_t lse, Tables tables,
                             Extent extent, int64_t heads, int64_t num_rows, float scale_log2) {
  const ForwardArguments a{q, k, v, as<void>(out), as<float>(lse), tables, heads, num_rows, scale_log2};
  with_head_dim(head_dim, [&](auto d) { short_forward<decltype(d)::value>(target, type, a, extent); });
}

void short_attention_backward(Target target, Type type, int head_dim, View q, View k, View v, View out, View grad_out, uintptr_t lse,
                              uintptr_t grad_lse, int64_t grad_lse_head, int64_t grad_lse_row, uintptr_t dq, uintptr_t dk, uintptr_t dv,
                              Tables tables, Extent extent, int64_t heads, int64_t num_rows, float scale, float scale_log2) {
  const BackwardArguments a{q, k, v, out, grad_out, as<const float>(lse), as<const float>(grad_lse), grad_lse_head, grad_lse_row,
                            as<void>(dq), as<void>(dk), as<void>(dv), tables, heads, num_rows, scale, scale_log2};
  with_head_dim(head_dim, [&](auto d) { short_backward<decltype(d)::value>(target, type, a, extent); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of hlip_kernels. Internal: use the functions of hlip_kernels, which check their arguments.";
  m.attr("architectures") = HLIP_ARCHITECTURES;
  m.attr("nvcc_version") = HLIP_NVCC_VERSION;

  py::enum_<Type>(m, "Type")
      .value("float32", Type::kFloat32)
      .value("float16", Type::kFloat16)
      .value("bfloat16", Type::kBFloat16)
      .value("uint8", Type::kUInt8)
      .value("int16", Type::kInt16);

  py::class_<Target>(m, "Target", "Where to run: host memory, or a CUDA stream handle of the current device.")
      .def(py::init([](bool on_host, uintptr_t stream) { return Target{on_host, stream}; }), py::arg("on_host"), py::arg("stream") = 0);

  // The interpreter is released while a kernel is launched, or runs on the host.
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("segment_mean", &segment_mean, nogil, py::arg("target"), py::arg("type"), py::arg("x"), py::arg("out"), py::arg("partial"),
        py::arg("offsets"), py::arg("chunks"), py::arg("chunk_offsets"), py::arg("num_chunks"), py::arg("num_segments"),
        py::arg("channels"));
  m.def("segment_mean_backward", &segment_mean_backward, nogil, py::arg("target"), py::arg("type"), py::arg("grad_out"),
        py::arg("grad_x"), py::arg("offsets"), py::arg("chunks"), py::arg("num_chunks"), py::arg("num_tokens"), py::arg("num_rows"),
        py::arg("channels"));
  m.def("switch_tail", &switch_tail, nogil, py::arg("target"), py::arg("type"), py::arg("source"), py::arg("result"),
        py::arg("children"), py::arg("parents"), py::arg("num_parents"), py::arg("num_children"), py::arg("num_prefix"),
        py::arg("tail_rows"), py::arg("channels"), py::arg("up"), py::arg("divide"));
  m.def("patchify", &patchify, nogil, py::arg("target"), py::arg("voxel_type"), py::arg("type"), py::arg("voxels"), py::arg("out"),
        py::arg("scans"), py::arg("keep"), py::arg("num_scans"), py::arg("num_patches"), py::arg("pd"), py::arg("ph"), py::arg("pw"),
        py::arg("scale"), py::arg("shift"));
  m.def("patchify_backward", &patchify_backward, nogil, py::arg("target"), py::arg("voxel_type"), py::arg("type"),
        py::arg("grad_out"), py::arg("grad_voxels"), py::arg("scans"), py::arg("keep"), py::arg("num_scans"), py::arg("num_patches"),
        py::arg("pd"), py::arg("ph"), py::arg("pw"), py::arg("scale"));

  py::class_<View>(m, "View", "A (R, H, D) tensor: address, row stride and head stride in elements.")
      .def(py::init([](uintptr_t address, int64_t row, int64_t head) { return View{as<const void>(address), row, head}; }));
  py::class_<Tables>(m, "Tables", "Addresses of the int32 tables packs, starts and records.")
      .def(py::init([](uintptr_t packs, uintptr_t starts, uintptr_t records) {
        return Tables{as<const int>(packs), as<const int>(starts), as<const int>(records)};
      }));
  using Numbers = std::array<int64_t, 3>;
  py::class_<Extent>(m, "Extent", "Packs, those of one segment, rows; shared memory, packs (first, last, rows) for whole_backward.cuh.")
      .def(py::init([](int64_t packs, int64_t alone, int64_t rows, int64_t shared, Numbers large, Numbers small) {
             return Extent{packs, alone, rows, shared, {large[0], large[1], large[2]}, {small[0], small[1], small[2]}};
           }),
           py::arg("packs"), py::arg("alone"), py::arg("rows"), py::arg("shared") = 0, py::arg("large") = Numbers{},
           py::arg("small") = Numbers{});
  m.def("short_attention_forward", &short_attention_forward, nogil);
  m.def("short_attention_backward", &short_attention_backward, nogil);
}
