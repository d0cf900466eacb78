// The Python module `_cuda`: raw device pointers and a stream come in, work is enqueued; no torch.
#include <pybind11/pybind11.h>

#include <string>

#include "call.h"

namespace py = pybind11;

void bind_cuda_dequant_matmul(py::module_& module);
void bind_cuda_dequantize_groupwise(py::module_& module);
void bind_cuda_gptq_update(py::module_& module);
void bind_cuda_int8_matmul(py::module_& module);
void bind_cuda_pack_bits(py::module_& module);
void bind_cuda_quantize_activations(py::module_& module);
void bind_cuda_quantize_groupwise(py::module_& module);

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Native CUDA kernels of qkern; raw device pointers in, no torch.";
    module.attr("__version__") = QKERN_VERSION;
    module.attr("ARCHITECTURES") = QKERN_CUDA_ARCHITECTURES;
    module.def("probe", [] { return qk::cuda::error_name(qk::cuda::probe()); },
               "Why kernels of this build cannot run on the current device; empty if they can.");
    module.def("compiled_for", &qk::cuda::compiled_for,
               "Architecture, as in sm_NN, that the code for the current device was compiled for: older than the "
               "device where the driver translates PTX.");
#if defined(QKERN_CUDA_EMULATED)
    module.attr("EMULATED") = true;
    module.def("set_seed", &qk::cuda::set_seed, py::arg("seed"), "Of the order in which threads take turns; 0: in order.");
    module.def("set_small", &qk::cuda::set_small, py::arg("small"),
               "As sm_75: 64 KiB of shared memory, no asynchronous copies.");
#else
    module.attr("EMULATED") = false;
#endif
    bind_cuda_dequant_matmul(module);
    bind_cuda_dequantize_groupwise(module);
    bind_cuda_gptq_update(module);
    bind_cuda_int8_matmul(module);
    bind_cuda_pack_bits(module);
    bind_cuda_quantize_activations(module);
    bind_cuda_quantize_groupwise(module);
}
