"""The Triton kernels: bits against the reference, products within budgets, their layout, what they refuse.

On a machine without a GPU they run in Triton's interpreter, and are compiled for one without being run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from qkern.errors import InputError, UnsupportedError
from qkern.ops import (
    _triton,
    dequant_matmul,
    dequantize_groupwise,
    gptq_update,
    int8_matmul,
    pack_bits,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
    unpack_bits,
    unpack_weight,
)
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul import triton as host
from qkern.ops.quantize_groupwise import triton as quantize_host
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

COMPILING = __name__ == "__main__"
INTERPRETED = not torch.cuda.is_available() and not COMPILING
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not COMPILING else "cpu")
OPS = ("dequant_matmul", "dequantize_groupwise", "quantize_groupwise")
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # to compare NaNs bit for bit

# numpy, which the interpreter computes with, warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
# Triton decides when a function is decorated: its own at its first import (torch's, maybe), ours at theirs.
LATE = INTERPRETED and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if INTERPRETED and not LATE:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in OPS:
            _triton.kernels(name)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(
    shape: tuple[int, int],
    spelling: str,
    *,
    scale_dtype: torch.dtype = torch.float16,
    offsets: bool = False,
    act_order: bool = False,
) -> QuantizedWeight:
    """A weight with random parts."""
    scheme, (N, K) = Scheme.parse(spelling), shape
    g = generator(N * 1000 + K)
    codes = torch.randint(0, scheme.levels, (N, K), dtype=torch.uint8, generator=g)
    groups = (N, 5) if act_order else scheme.scale_shape(N, K)
    zeros = torch.randint(0, scheme.levels, groups, dtype=torch.uint8, generator=g)
    # Group 3 stays empty, the others are uneven.
    index = torch.tensor([0, 1, 2, 4, 4, 4])[torch.randint(0, 6, (K,), generator=g)].int()
    return QuantizedWeight(
        codes=pack_bits(codes, scheme.bits, backend="reference"),
        scales=(torch.randn(groups, generator=g) * 0.1).to(scale_dtype),
        zeros=zeros if scheme.zero_point and not offsets else None,
        offsets=torch.randn(groups, generator=g).to(scale_dtype) if offsets else None,
        group_index=index if act_order else None,
        shape=shape,
        scheme=scheme,
    ).to(DEVICE)


VARIANTS: list[dict[str, Any]] = [
    {"spelling": "w2g16z"},
    {"spelling": "w2g128"},
    {"spelling": "w3g32z"},
    {"spelling": "w3"},
    {"spelling": "w4g64"},
    {"spelling": "w4g7z", "scale_dtype": torch.bfloat16},
    {"spelling": "w8g96z"},
    {"spelling": "w8t"},
    {"spelling": "nf4g32"},
    {"spelling": "fp4"},
    {"spelling": "w4g32z", "offsets": True, "scale_dtype": torch.float32},
    {"spelling": "w8g128z", "offsets": True},
    {"spelling": "w3g64z", "act_order": True},
    {"spelling": "w4g64", "act_order": True, "scale_dtype": torch.bfloat16},
]


def label(variant: dict[str, Any]) -> str:
    return "-".join(str(value) if key == "spelling" else key for key, value in variant.items())


def variants(function):
    return pytest.mark.parametrize("variant", VARIANTS, ids=label)(function)


def exact_weight(qw: QuantizedWeight) -> torch.Tensor:
    """The weight in float64, from the formula and nothing that is under test."""
    qw = qw.to("cpu")
    scheme, (N, K) = qw.scheme, qw.shape
    codes = unpack_bits(qw.codes, scheme.bits, (N, K), backend="reference").double()
    group = qw.group_index
    if group is None:
        group = torch.arange(K) // max(scheme.group_length(K), 1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.double().expand(N, -1)[:, group.long()]

    if scheme.codebook is not None:
        return codebook(scheme.codebook).values.double()[codes.long()] * spread(qw.scales)
    if qw.offsets is not None:
        return codes * spread(qw.scales) + spread(qw.offsets)
    return (codes - (scheme.midpoint if qw.zeros is None else spread(qw.zeros))) * spread(qw.scales)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = RAW[a.itemsize]
    a, b = a.contiguous().cpu(), b.contiguous().cpu()
    return a.dtype == b.dtype and torch.equal(a.view(raw), b.view(raw))


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits agree; a NaN may be any NaN."""
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(0.0), b.nan_to_num(0.0))


def assert_same_weight(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.shape, a.scheme) == (b.shape, b.scheme)
    for name in ("codes", "scales", "zeros", "offsets", "group_index"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        assert left is None or same_bits(left, right), name


def activations(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, K, generator=generator(M + 7 * K)).to(DEVICE, dtype)


def within_budget(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether y is at most twice as wrong as torch's linear on the weight in x's dtype."""
    x, y = x.cpu(), y.cpu()
    exact = x.double() @ weight.T
    dense = torch.nn.functional.linear(x, weight.to(x.dtype))
    ours, theirs = (float((other.double() - exact).norm()) for other in (y, dense))
    return ours <= 2 * theirs


# ---- quantize_groupwise, dequantize_groupwise ----------------------------------------------------------

GRIDS = ["w2g16", "w3g32z", "w3", "w4g7z", "w4g128", "w8t", "w8g96z", "nf4g32", "fp4g16", "nf4g16d", "w4tz"]


@pytest.mark.parametrize("spelling", GRIDS)
@pytest.mark.parametrize("shape", [(1, 1), (9, 70), (2, 3, 33)], ids=str)
def test_the_same_codes_and_scales_as_the_reference(spelling, shape):
    weight = torch.randn(shape, generator=generator(1)) * 0.1
    weight[..., 0, : shape[-1] // 2] = 0
    weight[..., -1, -1] = 1000
    for dtype, scale_dtype in zip(FLOAT_DTYPES, FLOAT_DTYPES[1:] + FLOAT_DTYPES[:1], strict=True):
        rows = weight.to(dtype)
        expected = quantize_groupwise(rows, spelling, scale_dtype=scale_dtype, backend="reference")
        ours = quantize_groupwise(rows.to(DEVICE), spelling, scale_dtype=scale_dtype, backend="triton")
        assert_same_weight(ours.to("cpu"), expected)


def test_ties_and_ends_of_the_grid_round_as_the_reference_does():
    # The scale is 1: halves are ties.
    weight = torch.cat([torch.arange(-15, 16) / 2, torch.tensor([7.5])])[None].to(DEVICE)
    for spelling in ("w4", "w4z", "w8"):
        expected = quantize_groupwise(weight.cpu(), spelling, backend="reference")
        assert_same_weight(quantize_groupwise(weight, spelling, backend="triton").to("cpu"), expected)


def test_weights_with_strides_and_without_elements_quantize():
    weight = torch.randn(40, 6, generator=generator(0)).T
    expected = quantize_groupwise(weight, "w4g16z", backend="reference")
    assert_same_weight(quantize_groupwise(weight.to(DEVICE), "w4g16z", backend="triton").to("cpu"), expected)
    for shape in ((0, 32), (3, 0)):
        for spelling in ("w4g16", "w4z", "w4t"):
            empty = quantize_groupwise(torch.empty(shape, device=DEVICE), spelling, backend="triton")
            assert empty.codes.numel() == 0
            assert dequantize_groupwise(empty, backend="triton").shape == shape


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spelling", ["w4g16", "w4tz"])
def test_weights_that_are_not_finite_are_refused(value, spelling):
    weight = torch.ones(3, 40, device=DEVICE)
    weight[2, 33] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        quantize_groupwise(weight, spelling, backend="triton")


def test_a_scale_that_overflows_is_refused():
    with pytest.raises(InputError, match=r"overflows torch\.float16"):
        quantize_groupwise(torch.full((2, 32), 3e38, device=DEVICE), "w4g32", backend="triton")


def test_the_search_is_the_reference_s_and_the_log_says_so_once(caplog):
    quantize_host._say_once.cache_clear()
    weight = torch.randn(2, 32, generator=generator(0)).to(DEVICE)
    with caplog.at_level(logging.INFO, logger="qkern"):
        for _ in range(2):
            ours = quantize_groupwise(weight, "w4g16", search="mse", backend="triton")
    assert_same_weight(ours, quantize_groupwise(weight, "w4g16", search="mse", backend="reference"))
    assert [record.message for record in caplog.records if "search='mse'" in record.message] == [
        "quantize_groupwise has no Triton kernel for search='mse': the reference runs it"
    ]


@variants
def test_the_same_weights_as_the_reference(variant):
    for shape in ((1, 1), (9, 300)):
        qw = parts(shape, **variant)
        if shape[0] > 1:
            scales = qw.scales.clone()
            scales[0, 0] = torch.inf
            qw = replace(qw, scales=scales)
        for dtype in FLOAT_DTYPES:
            expected = dequantize_groupwise(qw.to("cpu"), dtype, backend="reference")
            assert same_values(dequantize_groupwise(qw, dtype, backend="triton"), expected)


def test_experts_decode():
    qw = quantize_groupwise(torch.randn(3, 5, 40, generator=generator(0)), "w4t", backend="reference")
    expected = dequantize_groupwise(qw, backend="reference")
    assert same_bits(dequantize_groupwise(qw.to(DEVICE), backend="triton"), expected)


# ---- dequant_matmul ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (16, 128), (9, 300), (0, 64), (4, 0), (0, 0)], ids=str)
@variants
def test_unpack_is_the_inverse_of_pack(variant, shape):
    qw = parts(shape, **variant)
    packed = pack_weight(qw, backend="triton")
    assert packed.layout.startswith("triton.planar/")
    assert_same_weight(unpack_weight(packed), qw)


def test_second_level_scales_survive_packing():
    qw = quantize_groupwise(torch.randn(7, 64, generator=generator(0)), "nf4g16d").to(DEVICE)
    back = unpack_weight(pack_weight(qw, backend="triton"))
    assert_same_weight(back, qw)
    for name in ("codes", "table", "absmax"):
        assert torch.equal(getattr(back.nested, name), getattr(qw.nested, name))
    assert (back.nested.offset, back.nested.block) == (qw.nested.offset, qw.nested.block)


@pytest.mark.parametrize("M", [1, 20])
@variants
def test_products_stay_within_the_budget(variant, M):
    qw = parts((20, 300), **variant)
    weight, packed = exact_weight(qw), pack_weight(qw, backend="triton")
    for dtype in FLOAT_DTYPES:
        x = activations(M, 300, dtype)
        y = dequant_matmul(x, packed, compute="float")
        assert y.dtype == dtype
        assert within_budget(y, x, weight)


@pytest.mark.parametrize("M", [2, 3, 8, 9, 16, 33, 65])
def test_every_tile_stays_within_the_budget(M):
    qw = parts((18, 100), "w4g32z")
    x = activations(M, 100, torch.float16)
    y = dequant_matmul(x, pack_weight(qw, backend="triton"), compute="float")
    assert within_budget(y, x, exact_weight(qw))


def test_the_torch_op_keeps_its_contract():
    packed = pack_weight(parts((9, 64), "w4g32"), backend="triton")
    x = activations(2, 64, torch.float32).requires_grad_()
    arguments = (x, packed.blob, None, packed.layout, 9, 64, packed.spelling, "float")
    torch.library.opcheck(torch.ops.qkern.dequant_matmul.default, arguments)


def test_autotuning_takes_the_fastest_tile_and_remembers_it(monkeypatch):
    import triton

    qw = parts((9, 64), "w4g32")
    packed = pack_weight(qw, backend="triton")
    state = host._weight(packed.blob, packed.layout, 9, 64, packed.spelling)
    x = activations(1, 64, torch.float16)
    times = iter([3.0, 1.0, *[2.0] * 100])

    def timed(call):
        assert within_budget(call(), x, exact_weight(qw))
        return next(times)

    monkeypatch.setattr(triton.testing, "do_bench", timed)
    table = state.config(1, x.dtype)

    def launch(tile: host.Config) -> torch.Tensor:
        return state.launch(tile, x, None)

    best = state.best(table, x.dtype, launch)
    assert (best.tokens, best.words) == (table.tokens, table.words)
    assert (best.rows, best.warps) == (8, 4)
    assert state.best(table, x.dtype, launch) is best


def test_a_device_with_little_shared_memory_takes_smaller_tiles(monkeypatch):
    packed = pack_weight(parts((9, 64), "w4g32"), backend="triton")
    state = host._weight(packed.blob, packed.layout, 9, 64, packed.spelling)
    wide = state.config(65, torch.float16)
    monkeypatch.setattr(_triton, "shared_memory", lambda device: 64 << 10)
    assert state.config(64, torch.float16) == state.config(65, torch.float16)
    assert state.config(65, torch.float16).rows < wide.rows


@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float32], ids=str)
def test_splits_of_k_and_bias(M, bias_dtype):
    qw = parts((12, 2100), "w4g128z")
    packed = pack_weight(qw, backend="triton")
    state = host._weight(packed.blob, packed.layout, 12, 2100, packed.spelling)
    config = state.config(M, torch.float16)
    assert state.splits(config, M, -(-state.used_words // config.words)) > 1
    x, bias = activations(M, 2100, torch.float16), activations(1, 12, bias_dtype)[0]
    y = dequant_matmul(x, packed, bias, compute="float")
    exact = x.double().cpu() @ exact_weight(qw).T + bias.double().cpu()
    # One rounding to fp16 and fp32 sums.
    torch.testing.assert_close(y.double().cpu(), exact, rtol=2**-10, atol=2e-3)
    assert torch.equal(dequant_matmul(x, packed, bias, compute="float"), y)


@pytest.mark.parametrize("M", [2, 16])
def test_x_of_any_strides_and_batches(M):
    qw = parts((9, 70), "w4g32")
    packed = pack_weight(qw, backend="triton")
    wide = activations(70, 2 * M, torch.float16)
    x = wide.T[::2]
    plain = dequant_matmul(x.contiguous(), packed, compute="float")
    assert torch.equal(dequant_matmul(x, packed, compute="float"), plain)
    assert torch.equal(dequant_matmul(x.view(1, M, 70), packed, compute="float")[0], plain)
    assert dequant_matmul(x[:0], packed, compute="float").shape == (0, 9)


def test_without_columns_the_product_is_the_bias():
    packed = pack_weight(parts((4, 0), "w4"), backend="triton")
    bias = activations(1, 4, torch.float16)[0]
    x = torch.empty(3, 0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(dequant_matmul(x, packed, bias, compute="float"), bias.expand(3, 4))


@pytest.mark.parametrize("M", [4, 16])
def test_nan_and_inf_stay_in_their_row_and_token(M):
    qw = parts((20, 128), "w4g64")
    scales = qw.scales.clone()
    scales[3, 1] = torch.nan
    x = torch.ones(M, 128, dtype=torch.float16, device=DEVICE)
    x[2, 5] = torch.inf
    y = dequant_matmul(x, pack_weight(replace(qw, scales=scales), backend="triton"), compute="float")
    expected = torch.zeros(M, 20, dtype=torch.bool)
    expected[:, 3] = expected[2] = True
    assert torch.equal(~torch.isfinite(y).cpu(), expected)


@variants
def test_gradients_of_x(variant):
    qw = parts((20, 96), **variant)
    weight, packed = exact_weight(qw), pack_weight(qw, backend="triton")
    dtype = variant.get("scale_dtype", torch.float16)
    x, grad = activations(3, 96, dtype).requires_grad_(), activations(3, 20, dtype)
    dequant_matmul(x, packed).backward(grad)
    assert within_budget(x.grad, grad, weight.T)


def test_int8_activations_are_the_reference_s():
    qw = parts((9, 70), "w4g32")
    x = activations(3, 70, torch.float32)
    ours = dequant_matmul(x, qw, compute="int8", backend="triton")
    assert torch.equal(ours, dequant_matmul(x, qw, compute="int8", backend="reference"))


def test_a_weight_of_another_backend_is_packed_again():
    qw = parts((9, 70), "w4g32")
    x = activations(3, 70, torch.float32)
    plain, ours = (pack_weight(qw, backend=backend) for backend in ("reference", "triton"))
    y = dequant_matmul(x, ours, compute="float")
    assert torch.equal(dequant_matmul(x, plain, compute="float", backend="triton"), y)
    assert torch.equal(dequant_matmul(x, ours, compute="float", backend="triton"), y)


def test_a_layout_that_does_not_go_with_the_blob_is_refused():
    packed = pack_weight(parts((9, 128), "w4g64"), backend="triton")
    assert packed.layout == "triton.planar/f16/none/2/64/plain/0"
    for layout in (
        "triton.planar/f16/none/2/64/plain",
        "triton.planar/f16/none/2/63/plain/0",
        "triton.cubic/f16/none/2/64/plain/0",
    ):
        with pytest.raises(InputError, match=f"unknown layout.*{layout}"):
            unpack_weight(replace(packed, layout=layout))
    with pytest.raises(InputError, match="must be contiguous uint8"):
        unpack_weight(replace(packed, layout="triton.planar/f16/none/200/64/plain/0"))
    with pytest.raises(InputError, match="is not that of a w4g64"):
        unpack_weight(replace(packed, layout="triton.planar/f16/none/1/64/plain/0"))
    with pytest.raises(InputError, match="must be contiguous uint8"):
        dequant_matmul(activations(1, 128, torch.float16), replace(packed, blob=packed.blob[:-1]))


# ---- the door ------------------------------------------------------------------------------------------


def test_the_door_says_why_it_is_closed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match=r"triton cannot run .* not on a CUDA device"):
        quantize_groupwise(torch.ones(2, 32), "w4", backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "on the CPU" in _triton.why_not_triton(torch.device("cuda"))
    _triton._why_not_installed.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        reason = _triton.why_not_triton(torch.device("cpu"))
    _triton._why_not_installed.cache_clear()
    assert "cannot be imported" in reason
    assert "pip install" in reason


def test_kernels_are_imported_on_first_use_only():
    code = (
        "import sys, qkern.ops; assert 'triton' not in sys.modules\n"
        "import qkern.nn, qkern.cli; assert not [name for name in sys.modules if 'triton_kernels' in name]"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_kernels_compile_for_a_gpu(tmp_path):
    """Without running: what contracts, divides by approximation or needs too much memory shows."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    # -P: Python would put the folder of the script first on its path.
    result = subprocess.run([sys.executable, "-P", __file__], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for name in ("multiply_many", "multiply", "update", "quantize"):
        assert f"\n{name} " in f"\n{result.stdout}"


POINTERS = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
# Compute capabilities that are compiled for, and the bytes of shared memory that a program has there.
TARGETS = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Compiled:
    """In a kernel's place: compiles what would be launched, and checks the code."""

    target = 80

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **keywords: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        options = {key: keywords.pop(key) for key in OPTIONS if key in keywords}
        names = self.function.arg_names
        values = dict(zip(names, args, strict=False)) | keywords
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value = values[name]
            if self.function.params[i].is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                specialized = isinstance(value, int) and not self.function.params[i].do_not_specialize
                if specialized and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.function, signature, constants, attributes)
        result = triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options)
        text = result.asm["ptx"]
        shared = result.metadata.shared
        assert shared <= TARGETS[self.target], (self.function.__name__, shared)
        # Without tensor cores for them, products of matrices are made of these.
        exact_products = keywords.get("WIDEN", False)
        if options.get("enable_fp_fusion") is False:
            assert exact_products or "fma.rn.f32" not in text
            assert "div.full.f32" not in text
            assert ".ftz" not in text
        print(self.function.__name__, constants, shared)


def compile_kernels() -> None:
    real = _triton.kernels

    class Kernels:
        def __init__(self, op: str) -> None:
            self.module = real(op)

        def __getattr__(self, name: str) -> Compiled:
            return Compiled(getattr(self.module, name))

    _triton.kernels = Kernels
    _triton.interpreted = lambda device: False
    _triton.why_not_triton = lambda device: None
    _triton.processors = lambda device: 132
    _triton.capability = lambda device: divmod(Compiled.target, 10)
    _triton.shared_memory = lambda device: TARGETS[Compiled.target]
    _triton.on_device = lambda device: contextlib.nullcontext()
    for variant in VARIANTS[2], VARIANTS[11]:
        qw = parts((64, 2048), **variant)
        dequantize_groupwise(qw, torch.float16, backend="triton")
        packed = pack_weight(qw, backend="triton")
        for M in (8, 64):
            dequant_matmul(activations(M, 2048, torch.float16), packed, compute="float")
        host.input_gradient(torch.ones(1, 64).half(), packed.blob, packed.layout, 64, 2048, packed.spelling)
        rows = torch.ones(64, 2048)
        quantize_host._ranges(rows, 32, 64)
        if qw.offsets is None:
            zeros = torch.zeros(64, 64, dtype=torch.uint8)
            quantize_host._encode(rows, qw.scales, zeros, qw.scheme, 1)
    factor, index = torch.eye(256), torch.zeros(256, dtype=torch.int32)
    for book in (None, "nf4"):
        zeros = None if book else torch.zeros(64, 1, dtype=torch.uint8)
        columns = torch.ones(64, 256), factor, torch.ones(64, 1), zeros, index
        gptq_update(*columns, bits=4, codebook=book, backend="triton")
    for options in ({"group_size": 64}, {"scale": 0.5}):
        quantize_activations(torch.ones(4, 4096).half(), **options, backend="triton")
    compile_integers(1, 64, 100)
    # Codebooks need the most shared memory, the widest tile more than the others.
    Compiled.target = 86
    packed = pack_weight(parts((64, 4096), "nf4"), backend="triton")
    for M in (64, 200):
        dequant_matmul(activations(M, 4096, torch.float16), packed, compute="float")
    Compiled.target = 90
    dequant_matmul(activations(200, 4096, torch.float16), packed, compute="float")
    Compiled.target = 75
    packed = pack_weight(parts((64, 2048), "w8"), backend="triton")
    dequant_matmul(activations(100, 2048, torch.float16), packed, compute="float")
    compile_integers(1)


def compile_integers(*tokens: int) -> None:
    for offsets, zero in ((False, None), (True, 5)):
        packed = pack_weight(parts((64, 2048), "w8z" if offsets else "w8", offsets=offsets), backend="triton")
        for M in tokens:
            x = torch.ones(M, 2048, dtype=torch.int8)
            int8_matmul(x, 0.5, packed, out_dtype=torch.float16, x_zero=zero)


if COMPILING:
    compile_kernels()
if LATE:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    @pytest.mark.timeout(900)
    def test_in_a_process_whose_triton_interprets():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
        )
        assert result.returncode == 0, result.stdout
