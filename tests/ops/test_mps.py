"""What runs on Apple's MPS: plain torch, of operators that torch has for MPS, without dtypes that MPS lacks.

No Apple hardware is needed: the operators are recorded on the CPU and looked up in the list that torch is
made from, which its wheel holds for torchgen.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from qkern.errors import UnsupportedError
from qkern.nn import QuantEmbedding, QuantLinear
from qkern.ops import (
    _cuda,
    _native,
    dequant_matmul,
    dequantize_groupwise,
    gguf_decode,
    gguf_encode,
    gptq_update,
    int8_linear,
    int8_matmul,
    pack_bits,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
    registry,
    unpack_bits,
    unpack_weight,
)
from qkern.ops.dequant_matmul import plain, resolve_compute
from qkern.ops.dequant_matmul import schema as matmul_schema
from qkern.ops.gguf_types import GGUF_TYPES
from qkern.ops.gptq_update import block
from qkern.ops.int8_matmul import schema as int8_schema
from qkern.ops.quantize_activations import schema as activations_schema
from qkern.ops.registry import Backend, Request
from qkern.quantizers import GPTQConfig, HessianAccumulator, quantize_gptq
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch._ops import OpOverload
    from torch.autograd.profiler_util import FunctionEvent

MPS = torch.device("mps")
# What torch refuses to make on MPS; complex numbers do not belong here either.
ABSENT = {torch.float64, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128}
COMPOSITE = (
    DispatchKey.CompositeImplicitAutograd,
    DispatchKey.CompositeExplicitAutograd,
    DispatchKey.CompositeExplicitAutogradNonFunctional,
)


class OperatorList:
    """torch's native_functions.yaml: which operator has a kernel for which dispatch key."""

    def __init__(self) -> None:
        folder = importlib.resources.files("torchgen") / "packaged/ATen/native"
        parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
        self._functions = {str(function.func.name): function for function in parsed.native_functions}
        self._kernels = parsed.backend_indices
        self._by_base: dict[str, list[str]] = {}
        for name in self._functions:
            self._by_base.setdefault(name.split(".")[0], []).append(name)

    def has(self, name: str, *keys: DispatchKey) -> bool:
        """Whether an overload, or the one that a structured operator delegates to, has one of the keys."""
        function = self._functions.get(name)
        if function is None:
            return False
        if any(self._kernels[key].has_kernel(function) for key in keys if key in self._kernels):
            return True
        delegate = function.structured_delegate
        return delegate is not None and self.has(str(delegate), *keys)

    def runs_on_mps(self, name: str) -> bool:
        return self.has(name, DispatchKey.MPS, *COMPOSITE)

    def any_overload(self, base: str, *keys: DispatchKey) -> bool:
        return any(self.has(name, *keys) for name in self._by_base.get(base, ()))


@cache
def operators() -> OperatorList:
    return OperatorList()


KERNELS: dict[str, Callable[..., Any]] = {
    "qkern::dequant_matmul": matmul_schema._forward,
    "qkern::dequant_matmul_group": matmul_schema._group_forward,
    "qkern::dequant_matmul_backward": matmul_schema._backward,
    "qkern::quantize_activations": activations_schema._run,
    "qkern::int8_matmul": int8_schema._run,
}


class Recorder(TorchDispatchMode):
    """Operators that were dispatched, each with the dtypes of its tensors; inside of qkern's own too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "qkern":
            with self:  # which is off in here, and would stay so in the kernel that func calls
                return KERNELS[func.name()](*args, **kwargs)
        out = NotImplemented
        if not operators().has(func.name().removeprefix("aten::"), DispatchKey.MPS):
            with self:
                out = func.decompose(*args, **kwargs)  # what it is implicitly composed of is recorded too
        if out is NotImplemented:
            out = func(*args, **kwargs)
        dtypes = {getattr(leaf, "dtype", leaf) for leaf in tree_leaves((args, kwargs, out))}
        self.seen.setdefault(func.name(), set()).update(
            dtype for dtype in dtypes if isinstance(dtype, torch.dtype)
        )
        return out

    def missing(self) -> set[str]:
        """Operators without a kernel that would run on MPS."""
        return {name for name in self.seen if not operators().runs_on_mps(name.removeprefix("aten::"))}

    def absent_dtypes(self) -> dict[str, set[torch.dtype]]:
        return {name: dtypes & ABSENT for name, dtypes in self.seen.items() if dtypes & ABSENT}


def called(roots: list[FunctionEvent]) -> Iterator[str]:
    """Operators that a profile shows and that MPS lacks; not below one that has a kernel of its own there.

    A composite kernel calls others, which the recorder does not see. The profile has no overloads, so an
    operator counts as present if any of its overloads is.
    """
    for event in roots:
        name = event.name.removeprefix("aten::")
        if not event.name.startswith("aten::"):
            yield from called(event.cpu_children)
        elif not operators().any_overload(name, DispatchKey.MPS):
            if not operators().any_overload(name, *COMPOSITE):
                yield event.name
            yield from called(event.cpu_children)


def profiled(call: Callable[[], Any]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return set(called([event for event in profiler.events() if event.cpu_parent is None]))


# What a model, and the quantizing of one, runs ------------------------------------------------------------

N, K, M = 8, 90, 3
SCHEMES = (
    *(f"w{bits}g32{zero}" for bits in (2, 3, 4, 8) for zero in ("", "z")),
    *("w4t", "w8", "w8t", "w8a8", "w4g32a8", "nf4g32", "fp4", "nf4g32d"),
)


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def forms(spelling: str) -> Iterator[Any]:
    """A weight of the scheme, the same with float offsets, and with the groups of its columns named."""
    qw = quantize_groupwise(weight(), spelling)
    yield qw
    if qw.zeros is not None:
        yield replace(qw, zeros=None, offsets=-qw.zeros.to(qw.scales.dtype) * qw.scales)
    if qw.scheme.group_size is not None:
        yield replace(qw, group_index=(torch.arange(K) * 7 % qw.scales.shape[1]).int())


def multiply(spelling: str) -> None:
    for qw in forms(spelling):
        packed = pack_weight(qw)
        unpack_weight(packed)
        for dtype, compute in (
            (torch.float32, "float"),
            (torch.float32, "int8"),
            (torch.bfloat16, "int8"),
            (torch.float16, "float"),
        ):
            dequantize_groupwise(qw, dtype)
            x = torch.randn(M, K).to(dtype).requires_grad_()
            bias = torch.randn(N).requires_grad_()
            dequant_matmul(x, packed, bias, compute=compute).sum().backward()
        many = torch.ops.qkern.dequant_matmul_group(
            x, [packed.blob] * 2, [None, None], packed.layout, [N, N], K, [packed.spelling] * 2, "float"
        )
        sum(many).sum().backward()


def quantize() -> None:
    for spelling in SCHEMES:
        quantize_groupwise(weight(), spelling)
    for dtype in (torch.float16, torch.bfloat16):
        quantize_groupwise(weight().to(dtype), "w4g32z", scale_dtype=dtype)
    quantize_groupwise(weight(), "w4g32z", search="mse", importance=torch.rand(K))
    for spelling in ("w8", "nf4g32"):
        quantize_groupwise(weight(), spelling, search="mse")
    for spelling in ("w8a8", "nf4g32", "fp4g32d"):
        quantize_groupwise(weight(), spelling, search="absmax")
    quantize_groupwise(torch.randn(2, N, K), "w4g32", scale_dtype=torch.bfloat16)
    dequantize_groupwise(quantize_groupwise(torch.randn(2, N, K), "w4t"))


def integers() -> None:
    x = torch.randn(2, M, K)
    for spelling in ("w8", "w8z", "w8t", "w8a8"):
        for qw in forms(spelling):
            packed = pack_weight(qw)
            int8_linear(x.bfloat16(), packed, torch.randn(N))
            int8_linear(x, packed, x_scale=0.1, x_zero=3)
            if qw.offsets is None:
                codes, _ = quantize_activations(x, group_size=32)
                int8_matmul(codes, None, packed, out_dtype=torch.int32)


def bits() -> None:
    for width in (2, 3, 4, 8):
        for layout in ("dense", "gptq", "words", *(["awq"] if width == 4 else [])):
            codes = torch.randint(0, 1 << width, (N, K), dtype=torch.uint8)
            packed = pack_bits(codes, width, layout=layout)
            assert torch.equal(unpack_bits(packed, width, (N, K), layout=layout), codes)


def gguf() -> None:
    for kind in GGUF_TYPES:
        raw = gguf_encode(torch.randn(2, 512, device="cpu"), kind, backend="cpu")
        gguf_decode(raw, kind)


def columns() -> None:
    w, hinv, scales = weight()[:, :8], torch.eye(8) + 0.01, torch.full((N, 1), 0.1)
    zeros, index = torch.full((N, 1), 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int32)
    gptq_update(w, hinv, scales, zeros, index, bits=4)
    gptq_update(w, hinv, scales, None, index, bits=4, codebook="nf4")


def gptq() -> None:
    width = 12
    statistics = HessianAccumulator(width)
    statistics.add(torch.randn(200, width).bfloat16())
    for scheme, config in (
        ("w4g4", GPTQConfig(candidates=2, sweeps=1)),
        ("w3g4z", GPTQConfig(act_order="desc_act", search="mse", block_size=4)),
        ("nf4g4", GPTQConfig(act_order="none", static_groups=True, search="minmax")),
    ):
        assert quantize_gptq(weight()[:, :width], statistics.value, scheme, config).error < 0.1


def modules() -> None:
    for scheme in ("w4g32z", "w8a8", "nf4g32"):
        layer = QuantLinear.from_linear(torch.nn.Linear(K, N), scheme)
        layer.compute = "float"
        layer(torch.randn(2, M, K).bfloat16())
        layer.to(torch.float16).state_dict()
        table = QuantEmbedding.from_embedding(torch.nn.Embedding(N, K), scheme)
        table(torch.tensor([[1, 5]]))
        table.compute = "float"
        table.as_linear(torch.randn(M, K))


CASES: dict[str, Callable[[], None]] = {
    **{spelling: lambda spelling=spelling: multiply(spelling) for spelling in SCHEMES},
    **{case.__name__: case for case in (quantize, integers, bits, gguf, columns, gptq, modules)},
}
EXPECTED = {
    "w3g32z": {"aten::__rshift__.Scalar", "aten::index_select", "aten::scatter_reduce_.two", "aten::addmm_"},
    "quantize": {"aten::amax", "aten::bucketize.Tensor", "aten::round", "aten::__lshift__.Scalar"},
    "gguf": {"aten::view.dtype", "aten::__rshift__.Scalar"},
    "integers": {"aten::mm", "aten::round_"},
    "gptq": {"aten::linalg_cholesky_ex", "aten::linalg_solve_triangular", "aten::sort.stable"},
}


@pytest.fixture
def as_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are served as tensors on MPS would be."""
    monkeypatch.setattr(registry, "PREFERENCE", (Backend.REFERENCE,))
    monkeypatch.setattr(block, "_on_cpu", lambda tensor: False)


@pytest.mark.usefixtures("as_on_mps")
@pytest.mark.parametrize("case", CASES)
def test_every_operator_has_an_mps_or_composite_kernel(case):
    with Recorder() as recorder:
        CASES[case]()
    assert recorder.seen.keys() >= EXPECTED.get(case, {"aten::copy_"})
    assert recorder.missing() == set()
    assert recorder.absent_dtypes() == {}
    assert profiled(CASES[case]) == set()


def test_an_operator_that_mps_lacks_is_reported():
    def call() -> None:
        torch.heaviside(torch.ones(2), torch.ones(2))  # structured: the kernels are those of its .out
        torch.geqrf(torch.eye(2))
        torch.ones(2).mul(2)

    with Recorder() as recorder:
        call()
    assert recorder.missing() == profiled(call) == {"aten::heaviside", "aten::geqrf"}
    assert operators().runs_on_mps("mul.Tensor")
    assert not operators().runs_on_mps("no_such_operator")


def test_an_operator_inside_a_composite_one_is_reported():
    # put is explicitly composed of a copy and put_, which the recorder cannot see.
    def call() -> None:
        torch.ones(2).put(torch.tensor([0]), torch.zeros(1))

    with Recorder() as recorder:
        call()
    assert recorder.missing() == set()
    assert profiled(call) == {"aten::put_"}


def test_dtypes_that_mps_lacks_are_reported():
    with Recorder() as recorder:
        torch.ones(2).double()
        torch.ones(2).to(torch.uint16)
        torch.ones(2) * 2.0
    assert recorder.absent_dtypes() == {"aten::_to_copy": {torch.float64, torch.uint16}}


def test_reference_serves_every_op_on_mps_but_gguf_encode():
    ops = {op for op, _ in registry._IMPLEMENTATIONS}
    served = {op for op, backend in registry._IMPLEMENTATIONS if backend == Backend.REFERENCE}
    assert ops - served == {"gguf_encode"}  # files are written from the CPU
    for spelling in ("w2g32", "w4g128z", "w8", "w8a8", "nf4g64", "nf4g64d"):
        for op in served - ({"int8_matmul"} if "w8" not in spelling else set()):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                request = Request(device=MPS, scheme=Scheme.parse(spelling), dtype=dtype)
                assert registry.select(op, "auto", request).backend == Backend.REFERENCE
                for native in (Backend.CPU, Backend.CUDA, Backend.TRITON):
                    assert registry.explain(op, native, request)
    with pytest.raises(UnsupportedError, match="no backend can run gguf_encode on mps"):
        registry.select("gguf_encode", "auto", Request(device=MPS))


def test_a_weight_on_mps_is_packed_plainly_and_keeps_its_activations():
    request = Request(device=MPS, scheme=Scheme.parse("w4g32"))
    assert registry.select("dequant_matmul", "auto", request).call is plain.pack
    assert resolve_compute("auto", SimpleNamespace(device=MPS), request.scheme, needs_grad=False) == "float"
    assert not block._on_cpu(SimpleNamespace(device=MPS))
    assert _cuda.why_not_cuda(MPS) is not None


@pytest.mark.usefixtures("as_on_mps")
def test_quant_linear_runs_without_native_kernels(monkeypatch):
    def refuse() -> None:
        raise AssertionError("a native kernel was asked for")

    monkeypatch.setattr(_native, "core", refuse)
    layer = QuantLinear.from_linear(torch.nn.Linear(K, N), "w4g32z")
    layer.compute = "float"
    x = torch.randn(M, K, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert layer.layout.startswith(plain.PREFIX)
    assert layer._handle is None
    dense = layer.dequantize()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, layer.bias))
    torch.testing.assert_close(x.grad, dense.sum(0).expand(M, K))
