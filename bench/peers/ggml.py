"""ggml's matrix product through the libraries inside llama-cpp-python, with and without its repacking.

As llama.cpp does it: a weight lies in a buffer of the CPU's, or in one of the type "CPU_REPACK" that
interleaves rows as it is filled; the product is a graph of one node, computed by the CPU backend. The types
of ctypes below are those of ggml.h, ggml-backend.h and ggml-cpu.h, which the wheel installs beside them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from contestant import Absent, Job, copies, relative_error, sample_rows

INSTALL = "pip install llama-cpp-python"
# ggml_type, weights and bytes of a block.
TYPES = {
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "q8_0": (8, 32, 34),
}
TYPES |= {"q2_K": (10, 256, 84), "q3_K": (11, 256, 110), "q4_K": (12, 256, 144)}
TYPES |= {"q5_K": (13, 256, 176), "q6_K": (14, 256, 210)}
TYPES |= {"iq4_nl": (20, 32, 18), "iq4_xs": (23, 256, 136)}
COMPARABLE = {"w2": ("q2_K",), "w3": ("q3_K",), "w4": ("q4_0", "q4_K"), "w8": ("q8_0",), "nf": ("q4_0",)}
F32, NODES = 0, 4
# int8 activations, one scale for 32 or 256.
ALLOWED = 2e-2


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Tensor(ctypes.Structure):
    """ggml_tensor, of which `data` and `extra` are looked at."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", c_void_p),
        ("padding", ctypes.c_char * 8),
    )


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_tensor_2d": (POINTER(Tensor), [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (POINTER(Tensor), [c_void_p, POINTER(Tensor), POINTER(Tensor)]),
    "ggml_nbytes": (c_size_t, [POINTER(Tensor)]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, POINTER(Tensor)]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, *[c_int64] * 3, c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, POINTER(Tensor), c_void_p]),
    "ggml_backend_tensor_set": (None, [POINTER(Tensor), c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [POINTER(Tensor), c_void_p, c_size_t, c_size_t]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
}


class Ggml:
    """The functions of `FUNCTIONS`, by their names without ``ggml_``."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")  # importing it would load much more than ggml
        if spec is None or spec.origin is None:
            raise ImportError("No module named 'llama_cpp'")
        folder = Path(spec.origin).parent / "lib"
        libraries = [ctypes.CDLL(str(next(folder.glob(f"*ggml{part}.*")))) for part in ("-base", "-cpu")]
        for name, (result, arguments) in FUNCTIONS.items():
            function = next(getattr(each, name) for each in libraries if hasattr(each, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.base, self.cpu = libraries
        if (
            self.tensor_overhead() < ctypes.sizeof(Tensor)
            or self.tensor_overhead() > ctypes.sizeof(Tensor) + 64
        ):
            raise Absent("this ggml has another ggml_tensor than the one described in bench/peers/ggml.py")
        self.backend = self.backend_cpu_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not in FUNCTIONS")

    @functools.cached_property
    def repack(self) -> int | None:
        """Buffer type that repacks, by way of the CPU's registry entry; None where there is none."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
        found = itertools.takewhile(lambda kind: kind is not None, (kinds[i] for i in itertools.count()))
        return next((kind for kind in found if self.backend_buft_name(kind) == b"CPU_REPACK"), None)

    def context(self, tensors: int, graphs: int = 0) -> int:
        """Room for the descriptions of tensors and of graphs with a product each, not for data."""
        size = (tensors + graphs) * (self.tensor_overhead() + 64)
        size += graphs * (self.graph_overhead_custom(NODES, False) + 64)
        return self.init(InitParams(size, None, True))

    def decode(self, kind: str, blocks: Any, values: int) -> Any:
        """Weights of some bytes, by the library's plain decoder."""
        import numpy as np

        out = np.empty(values, np.float32)
        decoder = getattr(self.base, f"dequantize_row_{kind}")
        decoder.restype, decoder.argtypes = None, [c_void_p, c_void_p, c_int64]
        decoder(blocks.ctypes.data, out.ctypes.data, values)
        return out


@functools.cache
def library() -> Ggml:
    return Ggml()


def VERSION() -> str:
    native, wheel = library(), importlib.metadata.version("llama_cpp_python")
    flags = ("avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "neon", "dotprod")
    built = [flag for flag in flags if getattr(native.cpu, f"ggml_cpu_has_{flag}")()]
    return f"ggml {native.version().decode()} (llama-cpp-python {wheel}; {' '.join(built)})"


def variants(scheme: str) -> list[str]:
    kinds = COMPARABLE.get(scheme[:2], ())
    return [f"ggml {kind}{way}" for kind in kinds for way in (" repacked", "")]


class Weights:
    """Copies of a weight of some type in a buffer of some kind, for as long as the process lives."""

    def __init__(self, kind: str, repack: bool, N: int, K: int, rotate: int) -> None:
        import numpy as np

        native, (number, block, block_bytes) = library(), TYPES[kind]
        if K % block:
            raise Absent(f"{kind} holds rows of multiples of {block}")
        buffer_type = native.repack if repack else native.backend_cpu_buffer_type()
        if buffer_type is None:
            raise Absent("this build of ggml repacks nothing")
        row_bytes = K // block * block_bytes
        count = copies(N * row_bytes, rotate)
        self.context = native.context(count)
        self.tensors = [native.new_tensor_2d(self.context, number, K, N) for _ in range(count)]
        self.buffer = native.backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not self.buffer:
            raise MemoryError("ggml has no memory for the weights")
        if repack and not self.tensors[0].contents.extra:
            raise Absent(f"{kind} is not repacked on this CPU")
        # Encoding is slow and does not matter here: some rows of weights, repeated.
        rows = min(N, 64)
        source = np.random.default_rng(0).standard_normal((rows, K), dtype=np.float32) * 0.02
        blocks = np.empty((rows, row_bytes), np.uint8)
        native.quantize_chunk(number, source.ctypes.data, blocks.ctypes.data, 0, rows, K, None)
        data = np.ascontiguousarray(np.resize(blocks, (N, row_bytes)))
        for tensor in self.tensors:
            if native.nbytes(tensor) != data.nbytes:
                raise ValueError(f"{kind}: ggml counts {native.nbytes(tensor)} bytes, not {data.nbytes}")
            native.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        picked = np.ascontiguousarray(data[sample_rows(N).numpy()])
        self.decoded = native.decode(kind, picked, len(picked) * K).reshape(-1, K).astype(np.float64)
        self.bytes = data.nbytes


@functools.cache
def weights(*arguments: Any) -> Weights:
    return Weights(*arguments)


def prepare(case: dict[str, Any]) -> Job:
    return encoding(case) if case.get("op") == "gguf_encode" else product(case)


def encoded(x: Any, importance: Any, name: str) -> tuple[Any, Any, Any]:
    """Encode with ggml's quantizer, which has one thread: decoded weights, the call, what it points into."""
    import numpy as np
    import torch

    name = name.replace("_k", "_K")
    number, block, block_bytes = TYPES[name]
    N, K = x.shape
    blocks = np.empty((N, K // block * block_bytes), np.uint8)
    pointer = None if importance is None else importance.data_ptr()
    call = functools.partial(
        library().quantize_chunk, number, x.data_ptr(), blocks.ctypes.data, 0, N, K, pointer
    )
    call()
    return (
        torch.from_numpy(library().decode(name, blocks, N * K).reshape(N, K)),
        call,
        (x, importance, blocks),
    )


def encoding(case: dict[str, Any]) -> Job:
    """Prepare ggml's quantizer on the weights of bench_gguf_encode.py."""
    from bench_gguf_encode import ALLOWED, loss
    from bench_gguf_encode import weights as random_weights

    x, importance, name = random_weights(case)
    decoded, call, memory = encoded(x, importance, name)
    lost = loss(x, decoded, importance)
    return Job(
        calls=[call],
        error=lost,
        allowed=ALLOWED[name.split("_")[0]],
        bytes=x.nbytes,
        facts={"loss": float(f"{lost:.6g}")},
        memory=memory,
    )


def product(case: dict[str, Any]) -> Job:
    import numpy as np
    import torch

    native, N, K, M = library(), case["N"], case["K"], case["M"]
    kind, _, way = case["variant"].removeprefix("ggml ").partition(" ")
    held = weights(kind, way == "repacked", N, K, case["rotate"])
    native.backend_cpu_set_n_threads(native.backend, case["threads"])
    x = np.random.default_rng(1).standard_normal((M, K), dtype=np.float32)
    context = native.context(len(held.tensors) + 2, graphs=len(held.tensors))
    column, out = (native.new_tensor_2d(context, F32, size, M) for size in (K, N))
    buffer = native.backend_alloc_ctx_tensors_from_buft(context, native.backend_cpu_buffer_type())
    native.backend_tensor_set(column, x.ctypes.data, 0, x.nbytes)
    calls = []
    for weight in held.tensors:
        node, graph = native.mul_mat(context, weight, column), native.new_graph_custom(context, NODES, False)
        native.backend_tensor_alloc(buffer, node, out.contents.data)
        native.build_forward_expand(graph, node)
        calls.append(functools.partial(native.backend_graph_compute, native.backend, graph))
    y = np.empty((M, N), np.float32)
    if calls[0]() != 0:
        raise RuntimeError("ggml_backend_graph_compute failed")
    native.backend_tensor_get(out, y.ctypes.data, 0, y.nbytes)
    truth = torch.from_numpy(x.astype(np.float64) @ held.decoded.T)
    return Job(
        calls=calls,
        error=relative_error(torch.from_numpy(y[:, sample_rows(N).numpy()]), truth),
        allowed=ALLOWED,
        bytes=held.bytes,
        operations=2 * M * N * K,
    )
