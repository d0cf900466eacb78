"""A GGUF as a transformers model: its weights bit for bit, its logits those of llama.cpp."""

import logging
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkern
from qkern import QuantEmbedding, QuantLinear
from qkern.cli import main
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.evaluation import read_text
from qkern.gguf import GGUFFile, read_tokenizer
from qkern.gguf.tokenizer import PRE_TOKENIZERS
from qkern.nn import TiedHead, quant_linears
from qkern.pipelines import export_gguf

# llama-cpp-python leaves /dev/null open when it silences llama.cpp.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HELD = ("q4_0", "q4_1", "q8_0")
IDS = torch.randint(0, 2000, (1, 24), generator=torch.Generator().manual_seed(0))
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "llama": {"num_key_value_heads": 1},
    "llama-tied": {"tie_word_embeddings": True, "attention_bias": False},
    "llama-rope3": {"rope_parameters": ROPE3},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"head_dim": 32},
    "qwen2": {"tie_word_embeddings": False},
    "qwen2-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen3": {},
}

# llama.cpp's source says so of them and of no other that is read.
ADD_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
ADD_BOS += ("jina-v5-nano", "tekken")


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids).logits.float()


def distance(first, second):
    return float((first - second).norm() / second.norm())


def decoded_model(folder, path):
    """The original model with the weights of a file, decoded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with GGUFFile(path) as file:
        assert not model.load_state_dict(dict(file.state_dict()), strict=False).unexpected_keys
    return model


def weights(model):
    """Every weight by name, decoded."""
    found = {f"{name}.weight": layer.dequantize() for name, layer in quant_linears(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantEmbedding):
            found[f"{name}.weight"] = module.dequantize()
    return found | dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["f32", "q4_0", "q4_1", "q5_1", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2"])
def test_weights_are_those_of_the_file(variant, kind, model_folder, tmp_path):
    folder, _ = model_folder(variant.split("-")[0], **VARIANTS[variant])
    path = tmp_path / "model.gguf"
    export_gguf(folder, path, kind)
    model = qkern.load(path, compute="float")
    found = weights(model)
    with GGUFFile(path) as file:
        expected = dict(file.state_dict())
        held = sum(info.type.name in HELD for info in file.tensors.values())
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    modules = list(model.modules())
    assert sum(isinstance(module, QuantLinear | QuantEmbedding) for module in modules) == held
    assert distance(logits(model), logits(decoded_model(folder, path))) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_llama_cpp(variant, model_folder, run_gguf, tmp_path):
    folder, original = model_folder(variant.split("-")[0], **VARIANTS[variant])
    export_gguf(folder, tmp_path / "whole.gguf", "f32")
    whole = logits(qkern.load(tmp_path / "whole.gguf"))
    assert distance(whole, logits(original)) < 1e-5
    assert distance(whole, run_gguf(tmp_path / "whole.gguf")(IDS)) < 1e-3
    export_gguf(folder, tmp_path / "q8.gguf", "q8_0")
    loaded = qkern.load(tmp_path / "q8.gguf", compute="float")
    assert quant_linears(loaded)
    # llama.cpp quantizes activations to int8 beside quantized weights.
    assert distance(logits(loaded), run_gguf(tmp_path / "q8.gguf")(IDS)) < 0.03


def test_a_file_of_llama_cpp_s_own_quantizer(model_folder, run_gguf, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder, _ = model_folder("llama", tie_word_embeddings=False)
    export_gguf(folder, tmp_path / "f32.gguf", "f32")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = 2  # Q4_0
    path = tmp_path / "q4_0.gguf"
    names = (str(tmp_path / "f32.gguf").encode(), str(path).encode())
    assert llama_cpp.llama_model_quantize(*names, parameters) == 0
    model = qkern.load(path, compute="float")
    assert len(quant_linears(model)) == 15
    assert distance(logits(model), run_gguf(path)(IDS)) < 0.03
    assert distance(logits(model), logits(decoded_model(folder, path))) < 1e-5


def test_a_tied_table_stays_one(model_folder, tmp_path):
    folder, _ = model_folder("qwen2", tie_word_embeddings=True)
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    model = qkern.load(tmp_path / "model.gguf", compute="float")
    assert isinstance(model.lm_head, TiedHead)
    assert model.lm_head.embedding is model.model.embed_tokens
    assert model.model.embed_tokens.compute == "float"
    again = model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    assert again.shape == (1, 8)


def test_dtype_and_compute(exported):
    model = qkern.load(exported("q4_0"), dtype=torch.bfloat16, compute="int8")
    assert model.dtype == torch.bfloat16
    assert {layer.compute for layer in quant_linears(model).values()} == {"int8"}
    assert logits(model, IDS % 2000).isfinite().all()
    assert qkern.load(exported("q4_0")).dtype == torch.float32


def test_what_is_decoded_is_said_once(exported, caplog):
    with caplog.at_level(logging.INFO, logger="qkern"):
        model = qkern.load(exported("q4_k_m"))
    assert not quant_linears(model)
    (line,) = [record.getMessage() for record in caplog.records if "decoded" in record.getMessage()]
    with GGUFFile(exported("q4_k_m")) as file:
        kinds = [info.type.name for info in file.tensors.values()]
    quantized = len(kinds) - kinds.count("f32")
    assert f"{quantized} tensors are decoded" in line
    assert f"{kinds.count('q6_k')} q6_k" in line
    caplog.clear()
    qkern.load(exported("q8_0"))
    assert "decoded" not in caplog.text


def split(path, folder, count):
    """Write the parts of a file as llama.cpp's gguf-split names and marks them."""
    import gguf

    reader = gguf.GGUFReader(path)
    for part in range(count):
        writer = gguf.GGUFWriter(folder / f"m-{part + 1:05}-of-{count:05}.gguf", "qwen2")
        if part == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind = field.types[0]
                    of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[part::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def test_split_files(exported, tmp_path):
    split(exported("q4_0"), tmp_path, 3)
    expected = logits(qkern.load(exported("q4_0")))
    for part in (1, 3):
        assert torch.equal(logits(qkern.load(tmp_path / f"m-{part:05}-of-00003.gguf")), expected)
    second = tmp_path / "m-00002-of-00003.gguf"
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(second.read_bytes())
    with pytest.raises(FormatError, match="by its metadata it is part 1 of 3"):
        qkern.load(alone)
    content = second.read_bytes()
    second.write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(FormatError, match="by its metadata it is part 2 of 3"):
        qkern.load(tmp_path / "m-00001-of-00003.gguf")
    second.write_bytes(content)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(FormatError, match=r"one of 3 parts, and m-00003-of-00003\.gguf is missing"):
        qkern.load(tmp_path / "m-00001-of-00003.gguf")


WRONG = {
    "architecture": ({"architecture": "mamba"}, UnsupportedError, "'mamba': read are llama, qwen2, qwen3"),
    "layers": ({"qwen2__block_count": 3}, FormatError, "missing are blk.2.attn_norm.weight"),
    "too many layers": ({"qwen2__block_count": 2**30}, FormatError, "1073741824 layers, but only"),
    "heads": ({"qwen2__attention__head_count": 2}, FormatError, "of another shape are blk.0.attn_q.weight"),
    "keys": (
        {"qwen2__attention__head_count_kv": 3},
        FormatError,
        "4 query heads of 16 for 3 key heads: needed are",
    ),
    "no heads": ({"qwen2__attention__head_count": 0}, FormatError, "must be a positive number: got 0"),
    "width": ({"qwen2__feed_forward_length": 512}, FormatError, "of another shape are blk.0.ffn_gate.weight"),
    "epsilon": (
        {"qwen2__attention__layer_norm_rms_epsilon": float("nan")},
        FormatError,
        "must be a positive number: got nan",
    ),
    "base": ({"qwen2__rope__freq_base": -1.0}, FormatError, "freq_base must be a positive number: got -1.0"),
    "context": ({"qwen2__context_length": None}, FormatError, "context_length must be a positive number"),
    "attention factor": (
        {"qwen2.rope.scaling.attn_factor": 2.0},
        UnsupportedError,
        "scaling with attn_factor 2.0 is not loaded: allowed is 1.0",
    ),
    "yarn's settings": (
        {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.yarn_beta_fast": 64.0},
        UnsupportedError,
        "scaling with yarn_beta_fast 64.0 is not loaded: allowed is 32.0",
    ),
    "yarn backwards": (
        {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 0.5},
        UnsupportedError,
        "scaling 'yarn' by 0.5",
    ),
    "factor": ({"qwen2.rope.scale_linear": -2.0}, FormatError, "scale_linear must be a positive number"),
    "scaling": ({"qwen2__rope__scaling__type": "longrope"}, UnsupportedError, "rotary scaling 'longrope'"),
    "rotary": ({"qwen2__rope__dimension_count": 8}, UnsupportedError, "rope.dimension_count is not the 16"),
    "experts": ({"qwen2__expert_count": 8}, UnsupportedError, "mixture of experts"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what, changed, model_folder, tmp_path):
    edits, error, message = WRONG[what]
    folder, _ = model_folder("qwen2")
    export_gguf(folder, tmp_path / "right.gguf", "q8_0")
    path = changed(tmp_path / "right.gguf", tmp_path / "wrong.gguf", **edits)
    with pytest.raises(error, match=message):
        qkern.load(path)


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "no type": ("llama", {"scaling.factor": 4.0}, LINEAR),
    "old key": ("qwen2", {"scale_linear": 4.0}, LINEAR),
    "new and old key": ("llama", {"scaling.factor": 4.0, "scale_linear": 8.0}, LINEAR),
    "factor 0": ("llama", {"scaling.factor": 0.0}, {"rope_type": "default"}),
    "no factor": ("qwen3", {"scaling.type": "yarn"}, {"rope_type": "default"}),
    "none": ("llama", {"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
    "in full": (
        "qwen2",
        {
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 16,
            "scaling.attn_factor": 1.0,
            "scaling.yarn_beta_fast": 32.0,
            "scaling.yarn_beta_slow": 1.0,
        },
        YARN,
    ),
    "with factors": (
        "llama-rope3",
        {"scaling.type": "linear", "scaling.factor": 4.0},
        {"rope_type": "longrope", "attention_factor": 1.0},
    ),
}


@pytest.mark.parametrize("what", SCALINGS)
def test_rotary_scaling_is_read_as_llama_cpp_reads_it(what, changed, model_folder, run_gguf, tmp_path):
    variant, keys, expected = SCALINGS[what]
    name = variant.split("-")[0]
    folder, _ = model_folder(name, **VARIANTS.get(variant, {}))
    export_gguf(folder, tmp_path / "plain.gguf", "f32")
    keys = {f"{name}.rope.{key}": value for key, value in keys.items()}
    model = qkern.load(changed(tmp_path / "plain.gguf", tmp_path / "model.gguf", **keys))
    assert expected.items() <= model.config.rope_parameters.items()
    found = logits(model)
    assert distance(found, run_gguf(tmp_path / "model.gguf")(IDS)) < 1e-3
    change = distance(found, logits(qkern.load(tmp_path / "plain.gguf")))
    assert change == 0 if expected["rope_type"] == "default" else change > 0.01


def test_yarn_beside_factors_is_refused(changed, model_folder, tmp_path):
    folder, _ = model_folder("llama", **VARIANTS["llama-rope3"])
    export_gguf(folder, tmp_path / "plain.gguf", "f32")
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    path = changed(tmp_path / "plain.gguf", tmp_path / "model.gguf", **keys)
    with pytest.raises(UnsupportedError, match=r"'yarn' by 4, or with rope_freqs\.weight, is not loaded"):
        qkern.load(path)


def random_blocks(kind, size, generator):
    """Blocks of any codes, and of scales and offsets that are any finite numbers of fp16."""
    of_block = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[kind]
    blocks = torch.randint(0, 256, (size // of_block, of_block), dtype=torch.uint8, generator=generator)
    for byte in (1, 3) if kind == "q4_1" else (1,):
        exponent = blocks[:, byte] & 0x7C
        blocks[:, byte] ^= torch.where(exponent == 0x7C, 0x40, 0).byte()
    return blocks.numpy().tobytes()


@pytest.mark.parametrize("kind", HELD)
def test_layers_have_the_decoder_s_bits(kind, model_folder, tmp_path):
    folder, _ = model_folder("llama", tie_word_embeddings=False)
    export_gguf(folder, tmp_path / "model.gguf", kind, pure=True)
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    generator = torch.Generator().manual_seed(0)
    with GGUFFile(tmp_path / "model.gguf") as file:
        for name, info in file.tensors.items():
            if info.type.name == kind:
                size = file[name].raw.numel()
                content[info.offset : info.offset + size] = random_blocks(kind, size, generator)
    (tmp_path / "random.gguf").write_bytes(content)
    model = qkern.load(tmp_path / "random.gguf", compute="float")
    assert len(quant_linears(model)) == 15
    found = weights(model)
    with GGUFFile(tmp_path / "random.gguf") as file:
        for name, weight in file.state_dict():
            assert torch.equal(found[name].view(torch.int32), weight.view(torch.int32)), name


def test_a_type_that_is_not_decoded_is_named_with_its_tensor(exported, tmp_path):
    content = bytearray(exported("q4_0").read_bytes())
    begin = content.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight")
    # Past dimensions and shape; TQ1_0 takes fewer bytes, so that the file stays a whole one.
    content[begin + 20 : begin + 24] = (34).to_bytes(4, "little")
    (tmp_path / "tq.gguf").write_bytes(content)
    with pytest.raises(
        UnsupportedError, match=r"tq\.gguf: tensor blk\.1\.ffn_up\.weight: .*34.* not decoded"
    ):
        qkern.load(tmp_path / "tq.gguf")


def test_scales_that_are_not_finite_are_refused(exported, tmp_path):
    content = bytearray(exported("q4_0").read_bytes())
    with GGUFFile(exported("q4_0")) as file:
        begin = file.tensors["blk.1.ffn_up.weight"].offset
    content[begin : begin + 2] = b"\x00\x7e"
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(FormatError, match=r"nan\.gguf: blk\.1\.ffn_up\.weight has NaN or Inf scales"):
        qkern.load(tmp_path / "nan.gguf")


def test_damaged_files_raise_nothing_else(changed, model_folder, tmp_path):
    """Bits of a small model's file flipped, mostly in its head: it loads, or one of two errors says why."""
    folder, _ = model_folder("llama", num_hidden_layers=1)
    export_gguf(folder, tmp_path / "whole.gguf", "q8_0")
    with GGUFFile(tmp_path / "whole.gguf") as file:
        unread = {key.replace(".", "__"): None for key in file.metadata if key.startswith("tokenizer.")}
    # Without its vocabulary, in which no flip matters here.
    content = changed(tmp_path / "whole.gguf", tmp_path / "small.gguf", **unread).read_bytes()
    with GGUFFile(tmp_path / "small.gguf") as file:
        head = min(info.offset for info in file.tensors.values())
    generator = random.Random(0)
    loaded = 0
    for trial in range(1500):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(head if generator.random() < 0.9 else len(damaged))
            damaged[place] = generator.choice((0, 1, 127, 255, damaged[place] ^ 1 << generator.randrange(8)))
        if trial % 20 == 0:
            del damaged[generator.randrange(len(damaged)) :]
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            qkern.load(tmp_path / "damaged.gguf")
            loaded += 1
        except (FormatError, UnsupportedError):
            pass
    assert 30 < loaded < 1200


def test_no_file():
    with pytest.raises(InputError, match=r"no GGUF file at none\.gguf"):
        qkern.load("none.gguf")


# The tokenizer -------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_model_s(shipped, exported):
    mine, its = read_tokenizer(exported("q4_0")), AutoTokenizer.from_pretrained(shipped)
    text = read_text(shipped / "heldout.txt")[:20_000]
    ids = its(text, verbose=False)["input_ids"]
    assert mine(text, verbose=False)["input_ids"] == ids
    assert mine.decode(ids) == its.decode(ids)
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(mine, f"{role}_token_id") == getattr(its, f"{role}_token_id")
    chat = [{"role": "user", "content": "Who?"}]
    assert mine.apply_chat_template(chat, tokenize=False) == its.apply_chat_template(chat, tokenize=False)
    text = "<|im_start|>user Who?<|im_end|>"
    assert mine(text)["input_ids"] == its(text)["input_ids"]


def test_tokenizers_that_are_not_read_are_named(changed, exported, tmp_path):
    for key, value, message in (
        ("tokenizer__ggml__pre", "chameleon", "the pre-tokenizer 'chameleon' is not known: known are gpt-2"),
        ("tokenizer__ggml__model", "bert", r"gpt2 .* and llama .*: got 'bert'"),
    ):
        path = changed(exported("q4_0"), tmp_path / f"{value}.gguf", **{key: value})
        with pytest.raises(UnsupportedError, match=message):
            read_tokenizer(path)


@pytest.mark.parametrize("name", [name for known in PRE_TOKENIZERS for name in (known.name, *known.also)])
def test_a_pre_tokenizer_s_name_means_what_llama_cpp_means(name, changed, exported, run_gguf, tmp_path):
    """How it splits, and whether a text begins with BOS where the file does not say."""
    keys = {"pre": name, "add_bos_token": None, "add_eos_token": None, "bos_token_id": 0}
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    path = changed(exported("q4_0"), tmp_path / "model.gguf", **keys)
    runner, read = run_gguf(path), read_tokenizer(path)
    for text in ("THE LORD's house, 12345 cubits;  HeLLo\n\n\tcaf\u00e9/\n", " In the beginning", "\u4f60 7"):
        assert read(text)["input_ids"] == runner.tokenize(text).tolist()
    assert (read("In")["input_ids"][0] == 0) == (runner.bos == 0) == (name in ADD_BOS)


def test_damaged_tokenizers_raise_nothing_else(exported, tmp_path):
    content = exported("q4_0").read_bytes()
    begin = content.index(b"tokenizer.ggml.model")
    with GGUFFile(exported("q4_0")) as file:
        end = min(info.offset for info in file.tensors.values())
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 3, 100))):
            damaged[generator.randrange(begin, end)] ^= 1 << generator.randrange(8)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            read_tokenizer(tmp_path / "damaged.gguf")("In the beginning")
        except (FormatError, UnsupportedError):
            refused += 1
    assert 30 < refused < 300


# The commands --------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0, capsys.readouterr()


def test_commands_take_a_file(shipped, exported, capsys, tmp_path):
    path = exported("q8_0")
    code, streams = run(capsys, "generate", path, "--prompt", "In the beginning", "--max-tokens", 8)
    model = qkern.load(path)
    ids = read_tokenizer(path)("In the beginning", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert (code, streams.out) == (0, read_tokenizer(path).decode(made, skip_special_tokens=True) + "\n")

    text = tmp_path / "text.txt"
    text.write_text(read_text(shipped / "heldout.txt")[:1500], encoding="utf-8")
    command = ("perplexity", path, "--text", text, "--window", 32)
    code, streams = run(capsys, *command, "--runner", "qkern")
    assert code == 0
    ours = float(streams.out.split()[1])
    assert ", qkern)" in streams.out
    theirs = float(run(capsys, *command)[1].out.split()[1])
    assert ours == pytest.approx(theirs, rel=0.02)
    code, streams = run(capsys, *command, "--compute", "int8")
    assert code == 1
    assert "or add --runner qkern" in streams.err
