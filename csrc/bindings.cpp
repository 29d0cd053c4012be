// The Python module hlip_kernels._C: raw addresses and a stream handle in, exceptions out. It links neither torch nor
// libcuda, so one build serves every torch, and importing it needs no driver.
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;
using namespace hlip;

#ifndef HLIP_ARCHITECTURES
#define HLIP_ARCHITECTURES ""
#endif
#ifndef HLIP_NVCC_VERSION
#define HLIP_NVCC_VERSION ""
#endif

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
}
