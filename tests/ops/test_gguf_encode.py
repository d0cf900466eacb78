"""gguf_encode: the same bytes in every tier, and less error than ggml's own encoders leave."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf import GGMLQuantizationType, quants
from qkern.errors import InputError, UnsupportedError
from qkern.ops import gguf_decode, gguf_encode
from qkern.ops._native import force_tier, usable_tiers
from qkern.ops.gguf_encode.fields import LAYOUTS
from qkern.ops.gguf_types import GGUF_TYPES

BLOCKS = [name for name, kind in GGUF_TYPES.items() if kind.block > 1]
SUPER_BLOCKS = [name for name in BLOCKS if GGUF_TYPES[name].block == 256]
# Root mean square error on Gaussian weights, relative to their deviation: measured 0.0804, 0.0685, 0.0398,
# 0.0327, 0.0053, 0.2585, 0.1428, 0.0691, 0.0335, 0.0163, 0.0731, 0.0737, and a margin of 3 %.
GAUSSIAN_ERROR = {
    "q4_0": 0.0828,
    "q4_1": 0.0706,
    "q5_0": 0.0410,
    "q5_1": 0.0337,
    "q8_0": 0.0055,
    "q2_k": 0.2662,
    "q3_k": 0.1471,
    "q4_k": 0.0712,
    "q5_k": 0.0345,
    "q6_k": 0.0168,
    "iq4_nl": 0.0753,
    "iq4_xs": 0.0759,
}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("K", [256, 768])
def test_tiers_give_the_same_bytes(name, K):
    x = gaussian(9, K)
    x[1] *= 1e-6
    x[2] *= 3000.0
    x[3] = 0.0
    x[4, ::7] = 40.0
    x[5, : K // 2] = 0.25
    importance = gaussian(K, seed=1).square()
    importance[:64] = 0
    encoded = []
    for tier in usable_tiers():
        with force_tier(tier):
            encoded.append((tier, gguf_encode(x, name), gguf_encode(x, name, importance=importance)))
    for tier, plain, weighted in encoded[1:]:
        assert torch.equal(plain, encoded[0][1]), tier
        assert torch.equal(weighted, encoded[0][2]), tier


@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_do_not_depend_on_the_rows_beside(name):
    x = gaussian(5, 768)
    x[2] *= 1000.0
    for importance in (None, gaussian(768, seed=1).square()):
        together = gguf_encode(x, name, importance=importance)
        alone = [gguf_encode(row[None], name, importance=importance) for row in x]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", GAUSSIAN_ERROR)
def test_error_on_gaussian_weights(name):
    x = gaussian(64, 1024)
    error = (gguf_decode(gguf_encode(x, name), name) - x).square().mean().sqrt()
    assert error < GAUSSIAN_ERROR[name]


@pytest.mark.parametrize("name", BLOCKS)
def test_constant_and_zero_rows(name):
    x = torch.zeros(4, 256)
    x[1], x[2], x[3] = 0.7, -0.3, torch.arange(256).eq(200) * 5.0
    decoded = gguf_decode(gguf_encode(x, name), name)
    assert torch.equal(decoded[0], x[0])
    # One value a block is held as well as fp16 scales and 6-bit factors hold it.
    assert (decoded - x).abs().max() <= 0.02 * 5.0
    assert (decoded[1:3] - x[1:3]).abs().max() <= 0.02 * 0.7


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_decoding_and_encoding_again_changes_little(name):
    x = gguf_decode(gguf_encode(gaussian(16, 512), name), name)
    again = gguf_decode(gguf_encode(x, name), name)
    if name in ("f32", "f16", "bf16"):
        assert torch.equal(again, x)
    else:
        assert (again - x).norm() <= 0.02 * x.norm()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "q8_0"])
def test_importance_moves_the_error(name):
    x = gaussian(64, 512)
    importance = torch.where(torch.arange(512) % 4 == 0, 50.0, 1.0)
    plain = (gguf_decode(gguf_encode(x, name), name) - x).square()
    weighted = (gguf_decode(gguf_encode(x, name, importance=importance), name) - x).square()
    assert (weighted * importance).sum() < 0.9 * (plain * importance).sum()
    # Only ratios count.
    assert torch.equal(
        gguf_encode(x, name, importance=importance * 2.0**-40), gguf_encode(x, name, importance=importance)
    )


def test_importance_without_any_is_like_none():
    x = gaussian(8, 256)
    assert torch.equal(gguf_encode(x, "q4_k", importance=torch.zeros(256)), gguf_encode(x, "q4_k"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides(dtype):
    x = gaussian(6, 256).to(dtype)
    expected = gguf_encode(x.float(), "q4_k")
    assert torch.equal(gguf_encode(x, "q4_k"), expected)
    assert torch.equal(gguf_encode(x.T.contiguous().T, "q4_k"), expected)
    assert torch.equal(gguf_encode(x.reshape(2, 3, 256), "q4_k"), expected.reshape(2, 3, -1))
    assert gguf_encode(x[:0], "q4_k").shape == (0, 144)


def test_f32_does_not_alias_its_input():
    x = gaussian(2, 8)
    encoded = gguf_encode(x, "f32")
    encoded.zero_()
    assert x.abs().min() > 0


@pytest.mark.parametrize("name", [name for name in GGUF_TYPES if name != "f32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(name, value):
    x = gaussian(3, 256)
    x[1, 37] = value
    with pytest.raises(InputError, match=f"{name} cannot hold"):
        gguf_encode(x, name)


def test_values_beyond_fp16_scales_are_refused():
    x = gaussian(3, 256)
    x[2, 5] = 7e4
    with pytest.raises(InputError, match="65504"):
        gguf_encode(x, "q4_k")
    assert gguf_decode(gguf_encode(x, "bf16"), "bf16")[2, 5] == x[2, 5].bfloat16().float()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [60000.0, 65500.0])
def test_values_at_the_end_of_fp16_stay_finite(name, size):
    x = (2 * torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) - 1) * size
    x[:, 0], x[:, 1] = -size, size
    decoded = gguf_decode(gguf_encode(x, name), name)
    # Two bits of evenly spread values leave a quarter of them, less what the sub-blocks' own ranges save.
    assert (decoded - x).norm() < (0.23 if name == "q2_k" else 0.2) * x.norm()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("light", [1e-10, 1e-14, 1e-22, 1e-31, 1e-42])
def test_columns_that_hardly_count(name, light):
    x = gaussian(64, 512)
    importance = torch.full((512,), light)
    importance[256:] = 1.0
    importance[5], x[:, 5] = 1.0, 0.0  # a block whose only weight that counts is zero
    decoded = gguf_decode(gguf_encode(x, name, importance=importance), name)
    assert (decoded - x)[:, 256:].norm() < GAUSSIAN_ERROR[name] * x[:, 256:].norm()
    assert decoded.isfinite().all()


@pytest.mark.parametrize("name", SUPER_BLOCKS)
def test_a_run_without_importance_hardly_counts(name):
    x = gaussian(64, 256)
    x[:, :32] *= 8
    errors = []
    for light in (0.0, 2.0**-8):
        importance = torch.ones(256)
        importance[:32] = light
        decoded = gguf_decode(gguf_encode(x, name, importance=importance), name)
        errors.append(float((decoded - x)[:, 32:].norm()))
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [1e-5, 1e-6])
def test_small_blocks_do_not_vanish(name, size):
    x = gaussian(64, 512) * size
    error = (gguf_decode(gguf_encode(x, name), name) - x).square().mean().sqrt()
    # fp16 has steps of 2^-24 here, and the values of IQ4 are up to 127 of them.
    steps = 3 if name.startswith("iq4") else 1
    assert error < GAUSSIAN_ERROR[name] * size + steps * 2.0**-24


@pytest.mark.parametrize("name", BLOCKS)
def test_no_unit_is_a_negative_zero(name):
    x = torch.zeros(6, 256)
    x[1] = -0.0
    x[2], x[3] = -1e-9, 1e-9
    x[4], x[5] = -1e-9 * gaussian(256).abs(), 1e-12 * gaussian(256)
    blocks = gguf_encode(x, name).reshape(-1, GGUF_TYPES[name].bytes)
    layout = LAYOUTS.get(name)
    for at in [0] if layout is None else [layout.d] + [layout.dmin] * (layout.dmin is not None):
        assert not (blocks[:, at : at + 2].contiguous().view(torch.int16) == -(2**15)).any()


def test_wrong_arguments_are_named():
    x = gaussian(2, 96)
    with pytest.raises(InputError, match=r"blocks of 256 weights: got rows of 96"):
        gguf_encode(x, "q6_k")
    with pytest.raises(InputError, match=r"unknown GGUF tensor type: got 'q4', allowed are f32"):
        gguf_encode(x, "q4")
    with pytest.raises(UnsupportedError, match=r"type not offered: got 'iq2_xs', allowed are f32"):
        gguf_encode(x, "iq2_xs")
    with pytest.raises(InputError, match=r"importance must have shape \[96\]"):
        gguf_encode(x, "q4_0", importance=torch.ones(95))
    with pytest.raises(InputError, match="negative"):
        gguf_encode(x, "q4_0", importance=-torch.ones(96))
    with pytest.raises(InputError, match="floating-point"):
        gguf_encode(x.int(), "q4_0")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]),
    seed=st.integers(0, 2**32 - 1),
    power=st.floats(0.2, 6),
    size=st.floats(-7, 4),
    zeros=st.floats(0, 1),
)
def test_no_block_is_worse_than_rounding_its_range(name, seed, power, size, zeros):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((4, 32))
    x = np.sign(x) * np.abs(x) ** power * 10.0**size * (generator.random(x.shape) >= zeros)
    x = x.clip(-60000, 60000).astype(np.float32)
    kind = GGMLQuantizationType(GGUF_TYPES[name].id)
    with np.errstate(over="ignore"):
        rounded = quants.dequantize(quants.quantize(x, kind), kind)
    decoded = gguf_decode(gguf_encode(torch.from_numpy(x), name), name).numpy()
    ours, theirs = (np.square(y.astype(np.float64) - x).sum(1) for y in (decoded, rounded))
    # The steps of fp16 scales this small are coarse: 2^-24, times the largest code.
    assert (ours <= 1.001 * theirs + 32 * (2.0**-24 * 128) ** 2).all()


# What a super-block of any shape may lose of its energy: 4 bits at most a few percent; of 3000 random ones
# Q2_K lost at most 0.148, Q3_K 0.035.
SUPER_ERROR = {"q2_k": 0.2, "q3_k": 0.05, "q4_k": 0.05, "q5_k": 0.05, "q6_k": 0.05, "iq4_xs": 0.05}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(SUPER_ERROR)),
    seed=st.integers(0, 2**32 - 1),
    power=st.floats(0.2, 6),
    size=st.floats(-7, 4),
    zeros=st.floats(0, 1),
    blind=st.floats(0, 1),
)
def test_super_blocks_are_better_than_nothing(name, seed, power, size, zeros, blind):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((2, 256))
    x = np.sign(x) * np.abs(x) ** power * 10.0**size * (generator.random(x.shape) >= zeros)
    x = torch.from_numpy(x.clip(-60000, 60000).astype(np.float32))
    importance = torch.from_numpy((generator.random(256) >= blind).astype(np.float32))
    floor = 256 * (2.0**-24 * 63 * 63) ** 2
    for weights in (None, importance):
        decoded = gguf_decode(gguf_encode(x, name, importance=weights), name)
        scale = torch.ones(256) if weights is None else weights
        error = ((decoded - x).double().square() * scale).sum(1)
        energy = (x.double().square() * scale).sum(1)
        assert (error <= SUPER_ERROR[name] * energy + floor).all()


# 1000 blocks of 256 weights.
ROWS, COLUMNS = 125, 2048
# A few columns: of outliers, or those that count much and have small weights, as with outlier channels.
FEW = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(4))[: COLUMNS // 100]


def gaussian_rows():
    return 0.02 * gaussian(ROWS, COLUMNS)


def heavy_tailed():
    torch.manual_seed(3)
    return torch.distributions.StudentT(4.0).sample((ROWS, COLUMNS)) * 0.02


def trained_weights():
    from safetensors.torch import load_file

    import qkern

    folder = Path(qkern.__file__).parent / "demo" / "data" / "bible"
    tensors = load_file(folder / "model.safetensors")
    rows = torch.cat([value.float().flatten() for name, value in tensors.items() if "_proj.weight" in name])
    return rows[: ROWS * COLUMNS].reshape(ROWS, COLUMNS).contiguous()


def outlier_columns():
    x = trained_weights()
    x[:, FEW] *= 30
    return x


def light_columns():
    x = trained_weights()
    x[:, FEW] /= 30
    return x


def sparse_outliers():
    x = gaussian_rows()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.005] *= 10
    return x


def inverse_uniform():
    return gaussian_rows() / torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)).clamp(
        min=0.05
    )


def importance_for(make):
    importance = gaussian(COLUMNS, seed=6).square() + 0.01
    if make is light_columns:
        importance[FEW] *= 900
    return importance


def ggml_library():
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    return library


def ggml_encode(x, name, importance):
    kind = GGUF_TYPES[name]
    rows = x.numpy()
    out = np.zeros((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    weights = None if importance is None else importance.numpy()
    ggml_library().ggml_quantize_chunk(
        kind.id,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        len(rows),
        rows.shape[1],
        None if weights is None else weights.ctypes.data,
    )
    return torch.from_numpy(out)


KINDS = [
    gaussian_rows,
    heavy_tailed,
    trained_weights,
    outlier_columns,
    light_columns,
    sparse_outliers,
    inverse_uniform,
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_no_block_is_worse_than_that_of_ggml(name, make, weighted):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'")
    x = make()
    importance = importance_for(make) if weighted else None
    scale = torch.ones(COLUMNS) if importance is None else importance
    encoded = gguf_encode(x, name, importance=importance), ggml_encode(x, name, importance)
    ours, theirs = (
        ((gguf_decode(y, name) - x).double().square() * scale).reshape(-1, 256).sum(1) for y in encoded
    )
    assert ours.sum() < theirs.sum()
    assert (ours <= 1.02 * theirs).all()
