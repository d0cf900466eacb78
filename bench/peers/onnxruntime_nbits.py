"""onnxruntime's MatMulNBits with accuracy level 4: int8 activations, fp32 in and out."""

from __future__ import annotations

import functools
from typing import Any

from contestant import Absent, Job, copies, relative_error, sample_rows
from peers import grid, information

INSTALL = "pip install onnxruntime onnx"


def VERSION() -> str:
    import onnx  # noqa: F401 - writes the models
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def variants(scheme: str) -> list[str]:
    found = grid(scheme)
    return [f"onnxruntime {found[0]} bits"] if found and found[0] in (2, 4, 8) and found[1] else []


def model(N: int, K: int, bits: int, group: int, tensors: dict[str, Any]) -> bytes:
    """One node, whose weights are constants so that it packs them when the session is made."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=bits,
        block_size=group,
        accuracy_level=4,
    )
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size])
        for name, size in (("x", K), ("y", N))
    ]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@functools.cache
def pool(threads: int) -> Any:
    """Options of sessions that share one pool: hundreds of sessions may be gone round through."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return options


@functools.lru_cache(maxsize=2)
def sessions(scheme: str, N: int, K: int, rotate: int, threads: int) -> tuple[list[Any], Any]:
    """Sessions, each with its own copy of the weight, and the decoded rows that are checked."""
    import numpy as np
    import onnxruntime

    found = grid(scheme)
    assert found is not None
    bits, group, asymmetric = found
    if group is None or K % group or group < 16 or group & (group - 1):
        raise Absent("holds groups of a power of two from 16 on that divides K")
    random, rows, per_byte = np.random.default_rng(0), sample_rows(N).numpy(), 8 // bits
    codes = random.integers(0, 1 << bits, (N, K), dtype=np.uint8)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    packed = np.bitwise_or.reduce(codes.reshape(N, -1, per_byte) << shifts, axis=2)
    scales = random.uniform(0.01, 0.02, (N, K // group)).astype(np.float32)
    tensors = {"w": packed.reshape(N, K // group, -1), "s": scales.reshape(-1)}
    zeros = np.full((N, K // group), 1 << (bits - 1), np.uint8)
    if asymmetric:
        zeros = random.integers(0, 1 << bits, zeros.shape, dtype=np.uint8)
        padded = np.zeros((N, -(-zeros.shape[1] // per_byte) * per_byte), np.uint8)
        padded[:, : zeros.shape[1]] = zeros
        tensors["z"] = np.bitwise_or.reduce(padded.reshape(N, -1, per_byte) << shifts, axis=2).reshape(-1)
    grouped = codes[rows].reshape(len(rows), -1, group).astype(np.float64) - zeros[rows][..., None]
    decoded = (grouped * scales[rows][..., None]).reshape(len(rows), K)
    content, options = model(N, K, bits, group, tensors), pool(threads)
    count = copies(packed.nbytes, rotate)
    made = [
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for _ in range(count)
    ]
    return made, decoded


def prepare(case: dict[str, Any]) -> Job:
    import numpy as np
    import torch

    N, K, M = case["N"], case["K"], case["M"]
    made, decoded = sessions(case["scheme"], N, K, case["rotate"], case["threads"])
    x = np.random.default_rng(1).standard_normal((M, K), dtype=np.float32)
    y = np.empty((M, N), np.float32)
    calls = []
    for session in made:
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        calls.append(functools.partial(session.run_with_iobinding, binding))
    calls[0]()
    truth = torch.from_numpy(x.astype(np.float64) @ decoded.T)
    return Job(
        calls=calls,
        error=relative_error(torch.from_numpy(y[:, sample_rows(N).numpy()]), truth),
        allowed=2e-2,
        bytes=information(case["scheme"], N, K),
        operations=2 * M * N * K,
        memory=(x, y),
    )
