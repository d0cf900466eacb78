"""Every format against an unpacker written bit by bit from its definition; its limits and configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkern.checkpoints import FORMATS, Entry, detect, refusals
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.ops import pack_bits
from qkern.schemes import QuantizedWeight, Scheme

NAMES = list(FORMATS)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_weight(
    scheme: Scheme,
    N: int,
    K: int,
    *,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, scheme.levels, (N, K), generator=generator, dtype=torch.uint8)
    groups = scheme.num_groups(K)
    # v1 has no zero point of 0.
    zeros = torch.randint(1, scheme.levels, (N, groups), generator=generator, dtype=torch.uint8)
    order = torch.randperm(K, generator=generator)
    index = (torch.arange(K, dtype=torch.int32) // scheme.group_length(K))[order]
    return QuantizedWeight(
        codes=pack_bits(codes, scheme.bits, layout="dense", backend="reference"),
        scales=torch.randn(N, groups, generator=generator).to(dtype),
        shape=(N, K),
        scheme=scheme,
        zeros=zeros if scheme.zero_point else None,
        group_index=index if act_order else None,
    )


def stream_bits(word_list: np.ndarray, start: int, bits: int) -> int:
    """Code that starts at bit `start` of a little-endian stream of 32-bit words, bit by bit."""
    value = 0
    for i in range(bits):
        position = start + i
        value |= ((int(word_list[position // 32]) >> (position % 32)) & 1) << i
    return value


def independent_weight(name: str, t: dict[str, np.ndarray], bits: int, g: int, N: int, K: int) -> np.ndarray:
    """The dense weight of layer m, straight from the definition of the format; float64."""
    weight = np.zeros((N, K))
    for n in range(N):
        for k in range(K):
            group = k // g
            if name in ("gptq", "gptq_v2"):
                group = int(t["m.g_idx"][k])
                q = stream_bits(t["m.qweight"][:, n], k * bits, bits)
                z = stream_bits(t["m.qzeros"][group], n * bits, bits) + (1 if name == "gptq" else 0)
                scale = t["m.scales"][group, n]
            elif name == "awq":
                shift = 4 * AWQ_ORDER.index(n % 8)
                q = int(t["m.qweight"][k, n // 8]) >> shift & 15
                z = int(t["m.qzeros"][group, n // 8]) >> shift & 15
                scale = t["m.scales"][group, n]
            else:
                q = stream_bits(t["m.weight_packed"][n], k * bits, bits)
                z = 2 ** (bits - 1)
                if "m.weight_zero_point" in t:
                    z = stream_bits(t["m.weight_zero_point"][:, group], n * bits, bits)
                scale = t["m.weight_scale"][n, group]
            weight[n, k] = (q - z) * float(scale)
    return weight


def formula(qw: QuantizedWeight) -> np.ndarray:
    words = as_numpy(qw.codes)
    weight = np.zeros(qw.shape)
    for n in range(qw.N):
        for k in range(qw.K):
            g = k // qw.scheme.group_length(qw.K) if qw.group_index is None else int(qw.group_index[k])
            z = qw.scheme.midpoint if qw.zeros is None else int(qw.zeros[n, g])
            weight[n, k] = (stream_bits(words[n], k * qw.scheme.bits, qw.scheme.bits) - z) * float(
                qw.scales[n, g]
            )
    return weight


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.numpy()
    return array.view(np.uint32) if array.dtype == np.int32 else array


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.shape, a.scheme) == (b.shape, b.scheme)
    for field in ("codes", "scales", "zeros", "group_index"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None), field
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y)), field


def schemes_of(name: str) -> list[Scheme]:
    bits = (4,) if name == "awq" else (2, 3, 4, 8)
    return [
        Scheme(bits=b, group_size=g, zero_point=z) for b in bits for g in (None, 16) for z in (False, True)
    ]


CASES = [(name, scheme) for name in NAMES for scheme in schemes_of(name)]


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=lambda value: str(value))
def test_bytes_mean_what_the_definition_says(name: str, scheme: Scheme) -> None:
    fmt = FORMATS[name]
    N, K = 32, 64
    for act_order in (False, True):
        if fmt.holds(scheme, N, K, act_order=act_order) is not None:
            continue
        qw = random_weight(scheme, N, K, act_order=act_order and scheme.group_size is not None)
        tensors = fmt.encode("m", qw)
        assert {key.split(".")[1] for key in tensors} <= fmt.parts
        arrays = {key: as_numpy(value) for key, value in tensors.items()}
        found = independent_weight(name, arrays, scheme.bits, scheme.group_length(K), N, K)
        np.testing.assert_array_equal(found, formula(qw))
        config = fmt.config({"m": scheme}, act_order=qw.group_index is not None)
        assert_same(fmt.decode("m", tensors, fmt.entry_of(config)("m")), qw)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    bits=st.sampled_from((2, 3, 4, 8)),
    zero_point=st.booleans(),
    group_size=st.sampled_from((None, 1, 8, 16, 24, 32, 64, 128)),
    N=st.integers(1, 80),
    K=st.integers(1, 160),
    act_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_what_a_format_holds_comes_back(
    name: str, bits: int, zero_point: bool, group_size: int | None, N: int, K: int, act_order: bool, seed: int
) -> None:
    fmt = FORMATS[name]
    scheme = Scheme(bits=bits, group_size=group_size, zero_point=zero_point)
    qw = random_weight(scheme, N, K, act_order=act_order, seed=seed)
    if fmt.holds(scheme, N, K, act_order=act_order) is not None:
        with pytest.raises(UnsupportedError):
            fmt.encode("m", qw)
        return
    entry = fmt.entry_of(fmt.config({"m": scheme}, act_order=act_order))("m")
    again = fmt.decode("m", fmt.encode("m", qw), entry)
    # All zero points at the midpoint is what symmetric looks like in AWQ; an ordered index is dropped.
    assert torch.equal(again.codes, qw.codes)
    assert torch.equal(again.scales, qw.scales)
    if again.zeros is not None or again.scheme.zero_point:
        assert torch.equal(again.zeros, qw.zeros)
    else:
        assert qw.zeros is None or bool((qw.zeros == scheme.midpoint).all())
    if again.group_index is not None:
        assert torch.equal(again.group_index, qw.group_index)


def test_short_last_group() -> None:
    scheme = Scheme(bits=4, group_size=64)
    assert FORMATS["gptq"].holds(scheme, 32, 96) is None
    assert "divide" in str(FORMATS["awq"].holds(scheme, 32, 96))
    assert "divide" in str(FORMATS["compressed-tensors"].holds(scheme, 32, 96))
    qw = random_weight(scheme, 32, 96)
    tensors = FORMATS["gptq"].encode("m", qw)
    assert tensors["m.scales"].shape == (2, 32)
    assert tensors["m.g_idx"].tolist() == [0] * 64 + [1] * 32


@pytest.mark.parametrize("K", [96, 64])
def test_group_sizes_that_gptq_readers_refuse_are_read_and_not_written(
    K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, scheme = FORMATS["gptq_v2"], Scheme(bits=4, group_size=48, zero_point=True)
    qw = random_weight(scheme, 32, K)
    with pytest.raises(
        UnsupportedError, match=r"^m: GPTQ's readers refuse groups of 48: allowed are 16, 32, "
    ):
        fmt.encode("m", qw)
    monkeypatch.setattr("qkern.checkpoints.gptq.GROUP_SIZES", (48,))  # a writer that does not mind
    entry = fmt.entry_of(fmt.config({"m": scheme}))("m")
    tensors = fmt.encode("m", qw)
    monkeypatch.undo()
    assert_same(fmt.decode("m", tensors, entry), qw)


@pytest.mark.parametrize(
    ("name", "scheme", "N", "K", "act_order", "why"),
    [
        ("gptq", "w4g32", 32, 40, False, "multiples of 32"),
        ("gptq", "w4g32", 40, 32, False, "multiples of 32"),
        ("gptq", "w4g100", 64, 256, False, "groups of 100: allowed are 16, 32, 64, 128, 256, 512, 1024"),
        ("gptq_v2", "w4g2048", 64, 4096, False, "groups of 2048"),
        ("gptq", "nf4g64", 64, 64, False, "codebook"),
        ("gptq_v2", "w4t", 64, 64, False, "per tensor"),
        ("gptq_v2", "w4g64a8", 64, 64, False, "a8"),
        ("gptq_v2", "w4g64d", 64, 64, False, "double-quantized"),
        ("awq", "w3g32", 32, 32, False, "4 bits only"),
        ("awq", "w4g32z", 32, 32, True, "group index"),
        ("awq", "w4g32z", 36, 32, False, "output features"),
        ("awq", "w4g128z", 64, 64, False, "divide"),
        ("compressed-tensors", "w4g32", 32, 32, True, "group index"),
        ("compressed-tensors", "w4t", 32, 32, False, "per tensor"),
        ("compressed-tensors", "nf4g32", 32, 32, False, "codebook"),
        ("bitsandbytes", "w4g64", 64, 64, False, "holds nf4, fp4 and w8a8, its LLM.int8(): got w4g64"),
        ("bitsandbytes", "w8", 64, 64, False, "got w8"),
        ("bitsandbytes", "w8ta8", 64, 64, False, "got w8ta8"),
        ("bitsandbytes", "nf4g64a8", 64, 64, False, "got nf4g64a8"),
        ("bitsandbytes", "nf4g48", 64, 96, False, "blocks of 32, 64, 128"),
        ("bitsandbytes", "nf4", 64, 96, False, "blocks of 32, 64, 128"),
        ("bitsandbytes", "fp4g64d", 64, 96, False, "got K=96, blocks of 64"),
        ("bitsandbytes", "nf4g64", 64, 64, True, "group index"),
    ],
)
def test_holds_says_why_not(name: str, scheme: str, N: int, K: int, act_order: bool, why: str) -> None:
    fmt = FORMATS[name]
    reason = fmt.holds(Scheme.parse(scheme), N, K, act_order=act_order)
    assert reason is not None
    assert why in reason
    layers = {"a": (Scheme.parse(scheme), N, K), "b": (Scheme.parse("w4g32"), 32, 32)}
    assert "a" in refusals(fmt, layers, act_order=act_order)


@pytest.mark.parametrize("name", NAMES)
def test_float_offsets_are_refused_by_name(name: str) -> None:
    scales = torch.ones(32, 1, dtype=torch.float16)
    qw = QuantizedWeight(
        codes=torch.zeros(32, 4, dtype=torch.int32),
        scales=scales,
        shape=(32, 32),
        scheme=Scheme.parse("w4g32z"),
        offsets=scales,
    )
    with pytest.raises(UnsupportedError, match=r"layers\.0\.up: .*offsets"):
        FORMATS[name].encode("layers.0.up", qw)


def test_scales_become_fp16_only_when_nothing_changes() -> None:
    scheme = Scheme.parse("w4g32")
    fine = random_weight(scheme, 32, 32, dtype=torch.bfloat16)
    for name in ("gptq", "gptq_v2", "awq"):
        stored = FORMATS[name].encode("m", fine)["m.scales"]
        assert stored.dtype == torch.float16
        assert torch.equal(stored.float(), fine.scales.t().float())
    too_fine = random_weight(scheme, 32, 32, dtype=torch.float32)
    for name in ("gptq", "gptq_v2", "awq"):
        with pytest.raises(UnsupportedError, match=r"m\.scales: .*fp16"):
            FORMATS[name].encode("m", too_fine)
    kept = FORMATS["compressed-tensors"].encode("m", too_fine)["m.weight_scale"]
    assert torch.equal(kept, too_fine.scales)


def test_zero_point_of_zero_needs_v2() -> None:
    qw = random_weight(Scheme.parse("w4g32z"), 32, 32)
    assert qw.zeros is not None
    qw.zeros[5, 0] = 0
    with pytest.raises(UnsupportedError, match="gptq_v2"):
        FORMATS["gptq"].encode("m", qw)
    fmt = FORMATS["gptq_v2"]
    again = fmt.decode("m", fmt.encode("m", qw), Entry(scheme=qw.scheme))
    assert torch.equal(again.zeros, qw.zeros)


def test_a_symmetric_gptq_file_with_other_zero_points_keeps_them() -> None:
    qw = random_weight(Scheme.parse("w4g32z"), 32, 32)
    fmt = FORMATS["gptq"]
    again = fmt.decode("m", fmt.encode("m", qw), Entry(scheme=Scheme.parse("w4g32")))
    assert_same(again, qw)


def test_gptq_mixture_is_written_as_anchored_patterns() -> None:
    fmt = FORMATS["gptq"]
    schemes = {
        "model.layers.1.up": Scheme.parse("w4g32"),
        "model.layers.11.up": Scheme.parse("w4g32"),
        "model.layers.1.upx": Scheme.parse("w8"),
        "model.layers.2.up": Scheme.parse("w3g64z"),
    }
    config = fmt.config(
        schemes, skipped=["model.layers.1.gate", "lm_head"], details={"damp_percent": 0.1, "bits": 7}
    )
    assert (config["bits"], config["damp_percent"], config["lm_head"]) == (4, 0.1, False)
    for name, scheme in schemes.items():
        assert fmt.entry_of(config)(name).scheme == scheme, name
    assert fmt.entry_of(config)("modelXlayersX2Xup").scheme == Scheme.parse("w4g32")
    with pytest.raises(FormatError, match="excludes"):
        fmt.entry_of(config)("model.layers.1.gate")
    assert fmt.sidecars(config) == {"quantize_config.json": config}


def test_gptq_dynamic_first_match_wins() -> None:
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "dynamic": {
            r"+:.*\.down": {"bits": 8},
            r".*\.layers\.0\.": {"bits": 2, "group_size": 64},
            "-:.*up": {},
        },
    }
    entry = FORMATS["gptq"].entry_of(config)
    assert str(entry("model.layers.0.down").scheme) == "w8g128"
    assert str(entry("model.layers.0.up").scheme) == "w2g64"
    assert str(entry("model.layers.1.q").scheme) == "w4g128"
    with pytest.raises(FormatError, match="excludes"):
        entry("model.layers.1.up")


def test_compressed_tensors_groups() -> None:
    fmt = FORMATS["compressed-tensors"]
    one = fmt.config({"a.q": Scheme.parse("w4g32"), "a.k": Scheme.parse("w4g32")}, skipped=["lm_head"])
    assert [group["targets"] for group in one["config_groups"].values()] == [["Linear"]]
    assert one["ignore"] == ["lm_head"]
    schemes = {"a.q": Scheme.parse("w4g32"), "a.k": Scheme.parse("w2g16z"), "a.v": Scheme.parse("w8")}
    config = fmt.config(schemes)
    for name, scheme in schemes.items():
        assert fmt.entry_of(config)(name).scheme == scheme
    with pytest.raises(FormatError, match="no group"):
        fmt.entry_of(config)("a.o")
    named, pattern, kind = (dict(config["config_groups"][f"group_{i}"]) for i in range(3))
    named["targets"], pattern["targets"], kind["targets"] = ["a.q"], [r"re:a\..*"], ["Linear"]
    ordered = config | {"config_groups": {"x": kind, "y": pattern, "z": named}}
    assert [str(fmt.entry_of(ordered)(name).scheme) for name in ("a.q", "a.k", "b.k")] == [
        "w4g32",
        "w2g16z",
        "w8",
    ]


def test_awq_refuses_mixtures_and_names_inside_names() -> None:
    fmt = FORMATS["awq"]
    with pytest.raises(UnsupportedError, match="one group size"):
        fmt.config({"a": Scheme.parse("w4g32z"), "b": Scheme.parse("w4g64z")})
    with pytest.raises(UnsupportedError, match="gate_proj"):
        fmt.config({"l.0.mlp.gate_proj": Scheme.parse("w4g32z")}, skipped=["l.0.mlp.gate"])
    config = fmt.config({"l.0.mlp.up": Scheme.parse("w4z")}, skipped=["lm_head"])
    assert (config["group_size"], config["zero_point"], config["version"]) == (-1, True, "gemm")
    legacy = {"w_bit": 4, "q_group_size": 128, "zero_point": True}
    assert str(fmt.entry_of(legacy)("m").scheme) == "w4g128z"


@pytest.mark.parametrize(
    ("quantization", "problem"),
    [
        ({}, "quant_method"),
        ({"quant_method": 3}, "must be str"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
        ([1], "must be dict"),
    ],
)
def test_unknown_formats_are_named(quantization: object, problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        detect({"quantization_config": quantization})


def test_detect() -> None:
    assert detect({}) is None
    assert detect({"quantization_config": None}) is None
    for name, fmt in FORMATS.items():
        config = {"quantization_config": fmt.config({"m": Scheme.parse("w4g32z")})}
        found = detect(config)
        assert found is not None
        assert found[0].name == name
    plain = detect({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert plain is not None
    assert plain[0].name == "gptq"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bits": 5}, "unsupported bits"),
        ({"bits": "4"}, "must be int"),
        ({"bits": True}, "must be int"),
        ({"group_size": 0}, "at least 1"),
        ({"sym": 1}, "must be bool"),
        ({"dynamic": {"+:(": {}}}, "regular expression"),
        ({"dynamic": {"m": 4}}, "must be a dict"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
    ],
)
def test_gptq_config_that_cannot_be_read(change: dict, problem: str) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True} | change
    with pytest.raises(FormatError, match=problem):
        FORMATS["gptq"].entry_of(config)("m")


@pytest.mark.parametrize(
    ("name", "part", "change", "problem"),
    [
        ("gptq", "scales", None, "m.scales is missing"),
        ("gptq", "qzeros", lambda t: t[:, :-1], "m.qzeros must be int32"),
        ("gptq", "qweight", lambda t: t.float(), "m.qweight must be int32"),
        ("gptq", "qweight", lambda t: t[:-1], "m.g_idx must be"),
        ("gptq", "g_idx", lambda t: t.flip(0) + 7, "must number groups 0 to 1"),
        ("gptq", "g_idx", lambda t: t - 1, "must number groups"),
        ("awq", "scales", lambda t: t[:, :8], "m.scales must be"),
        ("awq", "qzeros", lambda t: t.short(), "int32"),
        ("compressed-tensors", "weight_shape", lambda t: t + 100, "weight_shape"),
        ("compressed-tensors", "weight_shape", lambda t: -t, "weight_shape"),
        ("compressed-tensors", "weight_shape", None, "weight_shape is missing"),
        ("compressed-tensors", "weight_zero_point", lambda t: t[:1], "zero points"),
        ("compressed-tensors", "weight_zero_point", None, "weight_zero_point is missing"),
        ("compressed-tensors", "weight_scale", lambda t: t.int(), "weight_scale must be"),
    ],
)
def test_damaged_tensors_are_named(name: str, part: str, change: object, problem: str) -> None:
    fmt = FORMATS[name]
    qw = random_weight(Scheme.parse("w4g32z"), 32, 64)
    tensors = fmt.encode("m", qw)
    if change is None:
        del tensors[f"m.{part}"]
    else:
        tensors[f"m.{part}"] = change(tensors[f"m.{part}"])
    with pytest.raises(FormatError, match=problem):
        fmt.decode("m", tensors, Entry(scheme=qw.scheme))


def test_format_names() -> None:
    from qkern.checkpoints import format_named

    with pytest.raises(InputError, match="compressed-tensors"):
        format_named("gguf")
