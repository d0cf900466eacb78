"""bitsandbytes checkpoints: quantized, written and read as the package and transformers do it."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional, nn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from qkern import load, quantize, save
from qkern.checkpoints import FORMATS, detect, read_quantized
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.nn import OutlierLinear, QuantLinear, quant_linears
from qkern.ops import dequantize_groupwise, quantize_groupwise, unpack_bits
from qkern.ops.codebooks import codebook
from qkern.ops.quantize_groupwise.nested import nest, renest
from qkern.schemes import Scheme

FORMAT = FORMATS["bitsandbytes"]
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
SCHEMES = ["nf4g64", "nf4g64d", "fp4g64", "fp4g64d"]


def random_weight(N, K, dtype=torch.float32, seed=0):
    """Gaussian with outliers, zeros of both signs and a block of nothing else."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    weight *= weight.abs() ** 0.5
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-6, -1e-6])
    weight[-1, :64] = 0
    return weight.to(dtype)


def theirs_of(weight, spelling):
    scheme = Scheme.parse(spelling)
    return functional.quantize_4bit(
        weight,
        blocksize=scheme.group_size,
        quant_type=scheme.codebook,
        compress_statistics=scheme.double_quant,
    )


def codes_of(packed, shape):
    """Codes of bitsandbytes' bytes, the first in the upper half."""
    return torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(shape)


def assert_same(qw, packed, state):
    assert torch.equal(unpack_bits(qw.codes, 4, qw.shape, layout="dense"), codes_of(packed, qw.shape))
    if qw.nested is None:
        assert torch.equal(qw.scales.view(-1), state.absmax)
        return
    assert torch.equal(qw.nested.codes, state.absmax)
    assert torch.equal(qw.nested.absmax, state.state2.absmax)
    assert torch.equal(qw.nested.table, state.state2.code)
    assert (qw.nested.offset, qw.nested.block) == (state.offset.item(), state.state2.blocksize)


# One layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", [*SCHEMES, "nf4g128d", "fp4g32"])
def test_quantization_is_bit_for_bit_that_of_bitsandbytes(spelling, dtype):
    # 2,308 scales of 64: the last block of 256 is short.
    for N, K in ((1, 128), (71, 2048), (577, 256)):
        weight = random_weight(N, K, dtype)
        qw = quantize_groupwise(weight, spelling, search="absmax")
        assert_same(qw, *theirs_of(weight, spelling))
        assert qw.scales.dtype == torch.float32


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_weights_on_the_borders_between_two_codes(name):
    values = codebook(name).values.double().unique()
    borders = ((values[1:] + values[:-1]) / 2).float()
    lines = []
    # Multiplying by the reciprocal and dividing differ in the last bit for some of these.
    for top in torch.rand(400, generator=torch.Generator().manual_seed(2)) + 0.5:
        line = torch.zeros(64)
        line[: len(borders)] = borders * top
        line[20 : 20 + len(borders)] = (borders * top).nextafter(torch.tensor(9.0))
        line[63] = top
        lines.append(line)
    weight = torch.stack(lines)
    qw = quantize_groupwise(weight, f"{name}g64", search="absmax")
    assert_same(qw, *theirs_of(weight, f"{name}g64"))
    # The search is what makes them equal.
    kernels = quantize_groupwise(weight, f"{name}g64", scale_dtype=torch.float32)
    assert not torch.equal(kernels.codes, qw.codes)


def test_absmax_of_stacks_and_of_nothing():
    stack = torch.stack([random_weight(6, 128, seed=seed) for seed in range(3)])
    for spelling in ("w8a8", "nf4g64", "fp4g64"):
        whole = quantize_groupwise(stack, spelling, search="absmax")
        for i, weight in enumerate(stack):
            one = quantize_groupwise(weight, spelling, search="absmax")
            assert torch.equal(whole.codes[i], one.codes)
            assert torch.equal(whole.scales[i], one.scales)
    for spelling in ("w8a8", "nf4g64", "fp4g64d"):
        for shape in ((0, 64), (3, 0)):
            qw = quantize_groupwise(torch.zeros(shape), spelling, search="absmax")
            assert dequantize_groupwise(qw).shape == shape
    short = quantize_groupwise(random_weight(4, 90), "nf4g64", search="absmax")  # in memory alone
    assert short.scales.shape == (4, 2)


def test_what_absmax_refuses():
    for spelling in ("w4g64", "w8", "w8za8", "nf4t"):
        with pytest.raises(InputError, match=f"is that of w8a8, nf4 and fp4.*got {spelling}"):
            quantize_groupwise(random_weight(4, 64), spelling, search="absmax")
    with pytest.raises(InputError, match="runs in plain torch: got backend='cpu'"):
        quantize_groupwise(random_weight(4, 64), "nf4g64", search="absmax", backend="cpu")
    for spelling, value in (("nf4g64", torch.nan), ("w8a8", 1e5)):  # the latter is Inf in fp16
        weight = random_weight(4, 64)
        weight[2, 3] = value
        with pytest.raises(InputError, match="NaN or Inf"):
            quantize_groupwise(weight, spelling, search="absmax")


@pytest.mark.parametrize("spelling", SCHEMES)
def test_the_package_reads_our_layer(spelling):
    qw = quantize_groupwise(random_weight(24, 192), spelling, search="absmax")
    tensors = FORMAT.encode("m", qw)
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMAT.stored_bytes(qw.scheme, 24, 192)
    packed = tensors.pop("m.weight")
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (24 * 192 // 2, 1))
    stats = {key.removeprefix("m."): value for key, value in tensors.items()}
    state = functional.QuantState.from_dict(stats, device="cpu")
    assert_same(qw, packed, state)
    assert torch.equal(functional.dequantize_4bit(packed, state), dequantize_groupwise(qw))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spelling", [*SCHEMES, "fp4g128d"])
def test_we_read_the_packages_layer(spelling, storage):
    weight = random_weight(40, 256, torch.bfloat16)
    packed, state = theirs_of(weight, spelling)
    stats = {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    # The configuration says what most layers are; this one says what it is itself.
    entry = FORMAT.entry_of({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"})("m")
    qw = FORMAT.decode("m", {**stats, "m.weight": packed.view(-1).view(storage).view(-1, 1)}, entry)
    assert (str(qw.scheme), qw.shape) == (spelling, (40, 256))
    assert_same(qw, packed, state)
    assert torch.equal(dequantize_groupwise(qw, torch.bfloat16), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("search", ["minmax", "absmax"])
def test_int8_comes_back(search, scale_dtype):
    weight = random_weight(24, 100)
    qw = quantize_groupwise(weight, "w8a8", search=search, scale_dtype=scale_dtype)
    tensors = FORMAT.encode("m", qw)
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMAT.stored_bytes(qw.scheme, 24, 100)
    fmt, config = detect({"quantization_config": FORMAT.config({"m": qw.scheme})})
    entry = fmt.entry_of(config)("m")
    assert entry.threshold is None
    again = fmt.decode("m", tensors, entry)
    assert torch.equal(again.codes, qw.codes)
    assert torch.equal(again.scales, qw.scales.float())
    theirs = functional.int8_vectorwise_dequant(tensors["m.weight"], tensors["m.SCB"])
    torch.testing.assert_close(theirs, dequantize_groupwise(qw), rtol=1e-6, atol=0)


def test_what_cannot_be_written():
    weight = random_weight(800, 64)
    fine = quantize_groupwise(weight, "w8a8", scale_dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="m: bitsandbytes stores 127 times the scales"):
        FORMAT.encode("m", fine)
    static = quantize_groupwise(weight, "w8a8")
    object.__setattr__(static, "input_scale", torch.ones(1))
    with pytest.raises(UnsupportedError, match=r"m: .* got a static input_scale"):
        FORMAT.encode("m", static)
    lost = quantize_groupwise(weight, "nf4g64d")
    object.__setattr__(lost, "nested", None)
    with pytest.raises(InputError, match="m: a nf4g64d weight without its nested scales"):
        FORMAT.encode("m", lost)
    stale = quantize_groupwise(weight, "nf4g64d")
    stale.scales[3] *= 1.01
    with pytest.raises(InputError, match="m: its nested scales, which are what is stored, are not those"):
        FORMAT.encode("m", stale)
    schemes = {"a": Scheme.parse("nf4g64"), "b": Scheme.parse("fp4g64d")}
    assert FORMAT.holds_together(schemes) is None
    assert "in 4 bits or in 8" in FORMAT.holds_together({**schemes, "c": Scheme.parse("w8a8")})


STATE = "m.weight.quant_state.bitsandbytes__nf4"


def state_bytes(**change):
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], "nested_blocksize": 256}
    text = json.dumps({**state, "nested_offset": 0.5, **change}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        (STATE, None, "bitsandbytes__nf4 is missing"),
        (STATE, torch.zeros(9, dtype=torch.uint8), "is no JSON"),
        (STATE, state_bytes(quant_type="fp4"), "must say quant_type 'nf4'"),
        (STATE, state_bytes(blocksize=48), "in blocks of 48 is not read"),
        (STATE, state_bytes(shape=[4]), "must be two sizes: got \\[4\\]"),
        (STATE, state_bytes(shape=[2, 96], blocksize=64), "got K=96, blocks of 64"),
        (STATE, state_bytes(shape=[8, 64]), "holds 128 bytes, not the codes of \\[8, 64\\]"),
        (STATE, state_bytes(nested_offset=float("nan")), "nested_offset that fp32 holds: got 256 and nan"),
        (STATE, state_bytes(nested_offset=1e300), "nested_offset that fp32 holds"),
        (STATE, state_bytes(nested_blocksize=0), "must have a nested_blocksize"),
        (STATE, state_bytes(nested_blocksize=10**30), "must have a nested_blocksize"),
        ("m.weight", torch.zeros(128, dtype=torch.uint8), "m.weight must be"),
        ("m.weight.quant_map", torch.zeros(16), "is not the codebook nf4"),
        ("m.weight.quant_map", codebook("nf4").values + 2e-6, "is not the codebook nf4"),
        ("m.weight.absmax", torch.zeros(4), "absmax must be uint8"),
        ("m.weight.nested_absmax", torch.zeros(2), "nested_absmax must be"),
        ("m.weight.nested_quant_map", None, "nested_quant_map is missing"),
    ],
)
def test_damaged_layers_are_named(name, tensor, problem):
    tensors = FORMAT.encode("m", quantize_groupwise(random_weight(4, 64), "nf4g64d"))
    entry = FORMAT.entry_of({})("m")
    FORMAT.decode("m", tensors, entry)
    changed = {key: value for key, value in {**tensors, name: tensor}.items() if value is not None}
    with pytest.raises(FormatError, match=problem):
        FORMAT.decode("m", changed, entry)


def test_a_block_of_scales_longer_than_all_takes_no_memory():
    qw = quantize_groupwise(random_weight(4, 64), "nf4g64d")
    long = {
        **FORMAT.encode("m", qw),
        STATE: state_bytes(nested_blocksize=2**31 - 1, nested_offset=qw.nested.offset),
    }
    read = FORMAT.decode("m", long, FORMAT.entry_of({})("m"))
    assert torch.equal(read.scales, qw.scales)
    assert torch.equal(nest(qw.scales, block=2**31 - 1).codes, nest(qw.scales).codes)
    assert torch.equal(renest(qw.scales * 2, read.nested).codes, renest(qw.scales * 2, qw.nested).codes)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"llm_int8_threshold": "6"}, "must be a number of 0 or more: got '6'"),
        ({"llm_int8_threshold": -1.0}, "0 or more: got -1.0"),
        ({"load_in_8bit": "yes"}, "'load_in_8bit' must be bool"),
        ({"load_in_8bit": False, "bnb_4bit_quant_type": "int4"}, "4-bit type 'int4'"),
    ],
)
def test_damaged_configurations_are_named(config, problem):
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True, **config}

    def entry():
        fmt, found = detect({"quantization_config": quantization})
        return fmt.entry_of(found)("m")

    with pytest.raises(FormatError, match=problem):
        entry()


def test_rows_in_another_order_are_refused():
    tensors = FORMAT.encode("m", quantize_groupwise(random_weight(4, 64), "w8a8"))
    fmt, config = detect({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    entry = fmt.entry_of(config)("m")
    assert entry.threshold == 6.0
    del tensors["m.weight_format"]  # older files have none
    fmt.decode("m", tensors, entry)
    with pytest.raises(FormatError, match="weight_format is 2: only 0 is read"):
        fmt.decode("m", {**tensors, "m.weight_format": torch.tensor(2, dtype=torch.uint8)}, entry)


# Whole models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("models") / "llama"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # A channel that stands out, as LLM.int8() is for.
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = 30.0
    model.save_pretrained(path)
    return path


def by_transformers(path: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def assert_same_files(ours, theirs):
    """Tensors are the same but for spaces and the dtype in the JSON."""
    a, b = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        if "quant_state" in name:
            x, y = (json.loads(bytes(t[name].tolist())) for t in (a, b))
            assert {**x, "dtype": None} == {**y, "dtype": None}
        else:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("spelling", SCHEMES)
def test_quantize_writes_what_transformers_writes(folder, tmp_path, spelling):
    scheme = Scheme.parse(spelling)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme.codebook,
        bnb_4bit_use_double_quant=scheme.double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = by_transformers(folder, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    report = quantize(folder, method="rtn", scheme=spelling, output=tmp_path / "ours")
    assert report.format == "bitsandbytes"
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    expected = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    changed = {"llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 0.0}
    assert written == {**expected, **changed}
    # Each reads the other, and they compute the same; bitsandbytes on a CPU in bf16, if it is not decoded.
    assert torch.equal(logits(by_transformers(tmp_path / "ours")), logits(theirs))
    truth = logits(by_transformers(tmp_path / "ours").dequantize())
    for name in ("ours", "theirs"):
        model = load(tmp_path / name, compute="float")
        assert {str(layer.scheme) for layer in quant_linears(model).values()} == {spelling}
        torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-5)
    # Written again, from the layout of the kernels: the same bytes.
    save(model, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "theirs")


def test_llm_int8_writes_what_transformers_writes(folder, tmp_path):
    theirs = by_transformers(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(folder, int8=True)
    save(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert (written["load_in_8bit"], written["load_in_4bit"], written["llm_int8_threshold"]) == (
        True,
        False,
        6.0,
    )
    truth = logits(theirs)
    assert torch.equal(logits(by_transformers(tmp_path / "ours")), truth)
    scale = float(truth.abs().max())
    for name in ("ours", "theirs"):
        model = load(tmp_path / name)
        assert {type(layer) for layer in quant_linears(model).values()} == {OutlierLinear}
        assert torch.equal(logits(model), logits(ours))
        assert float((logits(model) - truth).abs().max()) < 0.01 * scale
    assert isinstance(theirs.model.layers[0].mlp.up_proj, nn.Linear8bitLt)


def test_without_a_threshold_it_is_plain_w8a8(folder, tmp_path):
    quantize(folder, method="rtn", scheme="w8a8", format="bitsandbytes", output=tmp_path / "out")
    model = load(tmp_path / "out")
    assert {type(layer) for layer in quant_linears(model).values()} == {QuantLinear}
    assert torch.equal(logits(model), logits(quantize(folder, method="rtn", scheme="w8a8")))
    by_transformers(tmp_path / "out")


def test_int8_codes_without_scales_are_no_weight(folder, tmp_path):
    quantize(folder, method="rtn", scheme="w8a8", format="bitsandbytes", output=tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    layer = "model.layers.0.mlp.up_proj"
    loose = (f"{layer}.SCB", f"{layer}.weight_format")  # older bitsandbytes writes no format
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in loose}, file)
    with pytest.raises(FormatError, match=rf"integers in the place of floats.*: {layer}\.weight"):
        load(tmp_path / "out")


def test_a_folder_with_loose_parts_is_refused(folder, tmp_path):
    quantize(folder, method="rtn", scheme="nf4g64d", output=tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.0.mlp.up_proj.weight"
    map_ = tensors.pop(f"{layer}.quant_map")
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"belong to layers without weight\.quant_map"):
        read_quantized(tmp_path / "out")
    tensors[f"{layer}.quant_map"] = map_
    del tensors[layer]
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"up_proj\.weight is missing"):
        load(tmp_path / "out")
