"""Tokenizers in a file split text as they do in transformers."""

import json
import re
import struct

import pytest

from qkern.calibration import load_tokenizer
from qkern.errors import FormatError, UnsupportedError
from qkern.evaluation import read_text
from qkern.gguf import GGUFFile, read_tokenizer
from qkern.gguf.sentencepiece import TokenType, read_sentencepiece
from qkern.gguf.tokenizer import PRE_TOKENIZERS
from qkern.pipelines import export_gguf

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TEXTS = [
    "And he said, 12345 men;  they've gone \u2014 caf\u00e9!",
    " leading space",
    "x\n\n  y\tz",
    "HeLLo WORLD's \u4f60\u597d \U0001f600",
]


def byte_level(splits, text):
    """A byte-level BPE with the given split, trained on the spot."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if split == "digits"
        else pre_tokenizers.Split(Regex(split), behavior="isolated")
        for split in splits
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def sentencepiece_like(text):
    """A BPE over characters with byte fallback, as Llama 2 has it: tokenizer, vocabulary and merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(text.split("\n"), trainers.BpeTrainer(vocab_size=500, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer, vocabulary, merges


def put_tokenizer(folder, tokenizer, **special):
    from transformers import PreTrainedTokenizerFast

    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("known", PRE_TOKENIZERS, ids=lambda known: known.name)
def test_pre_tokenizers_are_recognized_and_split_alike(known, shipped, model_folder, run_gguf, tmp_path):
    tokenizer = byte_level(known.splits, read_text(shipped / "search.txt")[:30_000])
    tokenizer.model.ignore_merges = known.words_first
    folder, _ = model_folder("llama", vocab_size=tokenizer.get_vocab_size() + 3)
    fast = put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>")
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.ggml.pre"] == known.name
        assert file.metadata["tokenizer.ggml.token_type"][-3:] == [TokenType.UNUSED] * 3
        assert file.metadata["tokenizer.ggml.add_bos_token"] is False
    runner, read = run_gguf(tmp_path / "model.gguf"), read_tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        assert runner.tokenize(text).tolist() == fast(text)["input_ids"]
        assert read(text)["input_ids"] == fast(text)["input_ids"]


def test_bos_is_added_where_the_tokenizer_adds_it(shipped, model_folder, run_gguf, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level(PRE_TOKENIZERS[0].splits, read_text(shipped / "search.txt")[:5_000])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder, _ = model_folder("llama", vocab_size=tokenizer.get_vocab_size())
    fast = put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>")
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    runner = run_gguf(tmp_path / "model.gguf")
    assert runner.bos == 0
    assert runner.tokenize("In the").tolist() == fast("In the")["input_ids"]
    assert read_tokenizer(tmp_path / "model.gguf")("In the")["input_ids"] == fast("In the")["input_ids"]


@pytest.mark.parametrize(
    ("split", "words_first", "all_made", "name"),
    [
        ("llama-bpe", True, False, "llama-bpe"),
        ("llama-bpe", False, False, "dbrx"),
        ("llama-bpe", False, True, "dbrx"),
        ("tekken", False, True, "tekken"),
        ("tekken", False, False, None),
        ("qwen2", True, True, "qwen2"),
        ("qwen2", True, False, None),
    ],
)
def test_whether_words_come_before_merges_decides_too(
    split, words_first, all_made, name, shipped, model_folder, run_gguf, tmp_path
):
    from tokenizers import Tokenizer

    (splits,) = (known.splits for known in PRE_TOKENIZERS if known.name == split)
    content = json.loads(byte_level(splits, read_text(shipped / "search.txt")[:5_000]).to_str())
    vocabulary = content["model"]["vocab"]
    if not all_made:
        vocabulary["\u0120Zebulonites"] = len(vocabulary)
    content["model"]["ignore_merges"] = words_first
    tokenizer = Tokenizer.from_str(json.dumps(content))
    folder, _ = model_folder("llama", vocab_size=len(vocabulary))
    fast = put_tokenizer(folder, tokenizer, eos_token="</s>")
    path = tmp_path / "model.gguf"
    if name is None:
        with pytest.raises(UnsupportedError, match=f"ignore_merges {words_first}, known .*--pre-tokenizer"):
            export_gguf(folder, path, "q8_0")
        return
    export_gguf(folder, path, "q8_0")
    with GGUFFile(path) as file:
        assert file.metadata["tokenizer.ggml.pre"] == name
    ids = fast("and Zebulonites")["input_ids"]
    assert (ids[-1] == len(vocabulary) - 1) == (words_first and not all_made)
    assert run_gguf(path).tokenize("and Zebulonites").tolist() == ids
    assert read_tokenizer(path)("and Zebulonites")["input_ids"] == ids


@pytest.mark.parametrize(
    ("behavior", "invert", "fits"),
    [("Removed", True, True), ("Removed", False, False), ("MergedWithPrevious", False, False)],
)
def test_what_a_split_does_with_its_pieces_counts(behavior, invert, fits, shipped, model_folder, tmp_path):
    from tokenizers import Tokenizer

    content = json.loads(
        byte_level(PRE_TOKENIZERS[1].splits, read_text(shipped / "search.txt")[:5_000]).to_str()
    )
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": behavior, "invert": invert}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    folder, _ = model_folder("llama", vocab_size=tokenizer.get_vocab_size())
    put_tokenizer(folder, tokenizer, eos_token="</s>")
    if fits:
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")
        return
    with pytest.raises(UnsupportedError, match=f"not one that llama.cpp is known to have: got .*{behavior}"):
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")


def test_an_unknown_pre_tokenizer_is_refused_unless_named(shipped, model_folder, tmp_path):
    tokenizer = byte_level((r"\p{L}+|\P{L}+",), read_text(shipped / "search.txt")[:5_000])
    folder, _ = model_folder("llama", vocab_size=tokenizer.get_vocab_size())
    put_tokenizer(folder, tokenizer, eos_token="</s>")
    with pytest.raises(UnsupportedError, match=r"pre-tokenizer .*known are gpt-2, qwen2.*--pre-tokenizer"):
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []
    export_gguf(folder, tmp_path / "model.gguf", "q8_0", pre_tokenizer="qwen2")
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("name", "words_first", "all_made", "warning"),
    [
        ("qwen2", False, True, "pre-tokenizer 'qwen2' is not the tokenizer's own"),
        ("deepseek-llm", False, True, "pre-tokenizer 'deepseek-llm' is not known: known are gpt-2, phi-2"),
        ("nonsense", False, True, "pre-tokenizer 'nonsense' is not known: .*only if it has one of that name"),
        ("tekken", False, False, "'tekken' is not the tokenizer's own.*it has .*ignore_merges True; the "),
        ("tekken", False, True, None),
        ("tekken", True, False, None),
    ],
)
def test_a_named_pre_tokenizer_is_warned_of_if_it_may_not_fit(
    name, words_first, all_made, warning, shipped, model_folder, run_gguf, tmp_path, caplog
):
    from tokenizers import Tokenizer

    (splits,) = (known.splits for known in PRE_TOKENIZERS if known.name == "tekken")
    content = json.loads(byte_level(splits, read_text(shipped / "search.txt")[:5_000]).to_str())
    vocabulary = content["model"]["vocab"]
    if not all_made:
        vocabulary["\u0120Zebulonites"] = len(vocabulary)
    content["model"]["ignore_merges"] = words_first
    folder, _ = model_folder("llama", vocab_size=len(vocabulary))
    fast = put_tokenizer(folder, Tokenizer.from_str(json.dumps(content)), eos_token="</s>")
    path, text = tmp_path / "model.gguf", f"{TEXTS[3]} and 12345 Zebulonites"
    export_gguf(folder, path, "q8_0", pre_tokenizer=name)
    with GGUFFile(path) as file:
        assert file.metadata["tokenizer.ggml.pre"] == name
    assert bool(warning) == ("pre-tokenizer" in caplog.text)
    assert warning is None or re.search(warning, caplog.text)
    if name == "nonsense":
        with pytest.raises(FormatError, match=r"llama\.cpp cannot load"):
            run_gguf(path)
    elif name == "tekken":
        assert (run_gguf(path).tokenize(text).tolist() == fast(text)["input_ids"]) == (warning is None)


@pytest.mark.parametrize("step", ["a space before the text", "normalizer Lowercase"])
def test_what_llama_cpp_does_not_do_before_a_known_split_is_refused(step, shipped, model_folder, tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = byte_level(("digits",), read_text(shipped / "search.txt")[:5_000])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=step.startswith("a space"))
    if step.startswith("normalizer"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    folder, _ = model_folder("llama", vocab_size=tokenizer.get_vocab_size())
    put_tokenizer(folder, tokenizer, eos_token="</s>")
    with pytest.raises(UnsupportedError, match=step):
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def message(field, content):
    return varint(field << 3 | 2) + varint(len(content)) + content


def sentencepiece_bytes(vocabulary, merges, algorithm=2, added=(), prefix=1):
    """A tokenizer.model as the sentencepiece package would write it."""
    rank = {"".join(pair): number for number, pair in reversed(list(enumerate(merges)))}
    data = b""
    for text in vocabulary:
        kind = 2 if text == "<unk>" else 3 if text in ("<s>", "</s>") else 6 if text.startswith("<0x") else 1
        kind = 4 if text in added else kind
        score = struct.pack("<f", -float(rank.get(text, len(merges))))
        data += message(1, message(1, text.encode()) + b"\x15" + score + b"\x18" + varint(kind))
    return data + message(2, b"\x18" + varint(algorithm)) + message(3, b"\x18" + varint(prefix))


@pytest.mark.parametrize("from_file", [False, True])
def test_sentencepiece_bpe(from_file, shipped, model_folder, run_gguf, tmp_path):
    tokenizer, vocabulary, merges = sentencepiece_like(read_text(shipped / "search.txt")[:30_000])
    folder, _ = model_folder("mistral", vocab_size=len(vocabulary))
    fast = put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if from_file:
        (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(vocabulary, merges))
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.ggml.model"] == "llama"
        kinds = file.metadata["tokenizer.ggml.token_type"]
        assert kinds[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
        assert file.metadata["tokenizer.ggml.eos_token_id"] == 2
    runner, read = run_gguf(tmp_path / "model.gguf"), read_tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        assert runner.tokenize(text).tolist() == fast(text)["input_ids"]
        assert read(text)["input_ids"] == fast(text)["input_ids"]
        assert read.decode(read(text)["input_ids"]) == text


def test_a_sentencepiece_file_need_not_say_what_is_usual(changed, shipped, model_folder, run_gguf, tmp_path):
    tokenizer, vocabulary, _ = sentencepiece_like(read_text(shipped / "search.txt")[:30_000])
    folder, _ = model_folder("mistral", vocab_size=len(vocabulary))
    put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    export_gguf(folder, tmp_path / "full.gguf", "q8_0")
    usual = ("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id", "unknown_token_id")
    keys = dict.fromkeys([f"tokenizer.ggml.{key}" for key in (*usual, "add_space_prefix")])
    path = changed(tmp_path / "full.gguf", tmp_path / "model.gguf", **keys)
    runner, read = run_gguf(path), read_tokenizer(path)
    for text in TEXTS:
        ids = read(text)["input_ids"]
        assert ids[0] == 1
        assert runner.tokenize(text).tolist() == ids
    assert (read.eos_token, read.unk_token) == ("</s>", "<unk>")


@pytest.mark.parametrize(
    ("settings", "template", "with_json", "ends"),
    [
        ({"bos_token": None}, False, True, (False, False)),
        ({}, False, True, (False, False)),
        ({"add_bos_token": True}, False, True, (False, False)),
        ({"add_bos_token": False}, True, True, (True, True)),
        ({}, False, False, (True, False)),
        ({"add_bos_token": False, "add_eos_token": True}, False, False, (False, True)),
        ({"bos_token": None, "eos_token": None, "add_eos_token": True}, False, False, (False, False)),
    ],
)
def test_a_sentencepiece_folder_adds_what_its_tokenizer_does(
    settings, template, with_json, ends, shipped, model_folder, run_gguf, tmp_path
):
    from tokenizers.processors import TemplateProcessing

    tokenizer, vocabulary, merges = sentencepiece_like(read_text(shipped / "search.txt")[:30_000])
    if template:
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    folder, _ = model_folder("mistral", vocab_size=len(vocabulary))
    put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(vocabulary, merges))
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(usual | settings))
    text, plain = "In the beginning", tokenizer.encode("In the beginning", add_special_tokens=False).ids
    expected = [*([1] if ends[0] else []), *plain, *([2] if ends[1] else [])]
    if with_json:
        assert load_tokenizer(folder)(text)["input_ids"] == expected
    else:
        (folder / "tokenizer.json").unlink()
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    assert run_gguf(tmp_path / "model.gguf").tokenize(text).tolist() == expected
    assert read_tokenizer(tmp_path / "model.gguf")(text)["input_ids"] == expected


@pytest.mark.parametrize(
    ("pre", "edits"),
    [
        ("llama-bpe", {}),
        ("qwen2", {}),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}),
        ("llama-bpe", {"bos_token_id": 2**32 - 1, "eos_token_id": 5000, "add_eos_token": True}),
    ],
)
def test_a_byte_level_file_need_not_say_what_is_usual(
    pre, edits, changed, shipped, model_folder, run_gguf, tmp_path
):
    (known,) = (known for known in PRE_TOKENIZERS if known.name == pre)
    tokenizer = byte_level(known.splits, read_text(shipped / "search.txt")[:30_000])
    tokenizer.model.ignore_merges = known.words_first
    folder, _ = model_folder("llama", vocab_size=tokenizer.get_vocab_size())
    put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>")
    export_gguf(folder, tmp_path / "full.gguf", "q8_0")
    usual = dict.fromkeys(("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id"))
    keys = {f"tokenizer.ggml.{key}": value for key, value in (usual | edits).items()}
    path = changed(tmp_path / "full.gguf", tmp_path / "model.gguf", **keys)
    runner, read = run_gguf(path), read_tokenizer(path)
    assert (runner.llama.token_bos(), runner.llama.token_eos()) == (11, 11)
    part = read.decode([11])
    for text in [*TEXTS, f"a {part}{part} b{part}\n"]:
        ids = read(text)["input_ids"]
        assert (ids[0] == 11) == (pre == "llama-bpe" or "add_bos_token" in edits)
        assert runner.tokenize(text).tolist() == ids
    assert read.decode([11], skip_special_tokens=True) == part


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer.json"])
def test_tokens_added_to_a_sentencepiece_model_are_kept(file, shipped, model_folder, run_gguf, tmp_path):
    from tokenizers import AddedToken

    tokenizer, vocabulary, merges = sentencepiece_like(read_text(shipped / "search.txt")[:30_000])
    count = len(vocabulary)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    tokenizer.add_special_tokens(["<|im_end|>"])
    folder, _ = model_folder("mistral", vocab_size=count + 2)
    fast = put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>")
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(vocabulary, merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    if file == "added_tokens.json":
        (folder / "tokenizer.json").unlink()
        (folder / file).write_text(json.dumps({"<extra>": count, "<|im_end|>": count + 1}))
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    with GGUFFile(tmp_path / "model.gguf") as written:
        assert written.metadata["tokenizer.ggml.tokens"][-2:] == ["<extra>", "<|im_end|>"]
        kinds = written.metadata["tokenizer.ggml.token_type"]
        assert kinds[-2:] == [TokenType.USER_DEFINED, TokenType.CONTROL]
        assert written.metadata["tokenizer.ggml.eos_token_id"] == count + 1
    chat = "And he said<extra>unto<|im_end|>\nWho?"
    found = run_gguf(tmp_path / "model.gguf").llama.tokenize(chat.encode(), add_bos=False, special=True)
    assert found == fast(chat, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "tokenizer.model", "both files"])
def test_an_added_token_without_a_row_is_left_out(kind, shipped, model_folder, tmp_path, caplog):
    from tokenizers import AddedToken

    text, files = read_text(shipped / "search.txt")[:5_000], kind in ("tokenizer.model", "both files")
    like_llama, vocabulary, merges = sentencepiece_like(text)
    tokenizer = byte_level(PRE_TOKENIZERS[0].splits, text) if kind == "byte-level" else like_llama
    rows = tokenizer.get_vocab_size() + 1
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    tokenizer.add_special_tokens(["<pad>"])
    folder, _ = model_folder("mistral", vocab_size=rows)
    put_tokenizer(folder, tokenizer, pad_token="<pad>", eos_token="</s>")
    if files:
        (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(vocabulary, merges))
    if kind == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        (folder / "added_tokens.json").write_text(json.dumps({"<extra>": rows - 1, "<pad>": rows}))
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert ": <pad> have no row in the embedding and are left out" in caplog.text
    with GGUFFile(tmp_path / "model.gguf") as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert (len(tokens), tokens[rows - 1]) == (rows, "<extra>")
        assert "tokenizer.ggml.padding_token_id" not in file.metadata


DAMAGED = [
    ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    ("tokenizer_config.json", '{"bos_token": 5}'),
    ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
    ("special_tokens_map.json", '{"eos_token": {"text": "</s>"}}'),
    ("added_tokens.json", '{"a": "b"}'),
    ("added_tokens.json", '{"a": null}'),
    ("tokenizer.json", '{"model": []}'),
    ("tokenizer.json", '{"model": {}}'),
    ("tokenizer.json", '{"added_tokens": 3}'),
    ("tokenizer.json", '{"added_tokens": [{"content": "a"}]}'),
    ("chat_template.jinja", b"\xff"),
]


@pytest.mark.parametrize(("file", "content"), DAMAGED)
def test_damaged_files_of_a_tokenizer_are_named(file, content, model_folder, tmp_path):
    folder, _ = model_folder("mistral")
    for old in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
        old.unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(["<unk>", "<s>", "</s>", "a"], []))
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=rf"{re.escape(file)} .*; fetch it again"):
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def gemma_like(text):
    """A BPE as Gemma has it: no space before the text, runs of spaces and of newlines added as tokens."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    _, vocabulary, merges = sentencepiece_like(text)
    vocabulary = {
        token: number for number, token in enumerate([*vocabulary, "<turn>", "\u2581\u2581", "\n\n"])
    }
    merges = [("\u2581", "\u2581"), *merges]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for token in ("\u2581\u2581", "\n\n"):
        tokenizer.add_tokens([AddedToken(token, normalized=False)])
    tokenizer.add_special_tokens(["<turn>"])
    return tokenizer, vocabulary, merges


@pytest.mark.parametrize("from_file", [False, True])
def test_runs_of_spaces_are_tokens_where_they_were_added(
    from_file, shipped, model_folder, run_gguf, tmp_path
):
    tokenizer, vocabulary, merges = gemma_like(read_text(shipped / "search.txt")[:30_000])
    folder, _ = model_folder("gemma2", sliding_window=8, vocab_size=len(vocabulary))
    fast = put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if from_file:
        whole = sentencepiece_bytes(vocabulary, merges, added=("\u2581\u2581", "\n\n", "<turn>"), prefix=0)
        (folder / "tokenizer.model").write_bytes(whole)
        turn = {str(vocabulary["<turn>"]): {"content": "<turn>", "special": True}}
        settings = {"add_bos_token": True, "added_tokens_decoder": turn}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.ggml.add_space_prefix"] is False
        tokens, kinds = (file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert tokens[-2:] == ["  ", "\n\n"]
    assert kinds[-3:] == [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.USER_DEFINED]
    runner = run_gguf(tmp_path / "model.gguf")
    for text in [*TEXTS, "And  he   said\n\nunto    them", "  x"]:
        assert runner.tokenize(text).tolist() == fast(text)["input_ids"]


@pytest.mark.parametrize("called", ["phi3", "tiny", "Phi-3-mini"])
@pytest.mark.parametrize("strips", [False, True])
def test_white_space_after_special_tokens_is_dropped_where_the_tokenizer_does(
    strips, called, shipped, model_folder, run_gguf, tmp_path
):
    from tokenizers import AddedToken

    tokenizer, vocabulary, _ = sentencepiece_like(read_text(shipped / "search.txt")[:30_000])
    marks = ["<|endoftext|>", "<|user|>", "<|end|>"]
    # Phi-3's own tokens are there and strip; or they are not, and llama.cpp must not ask for them.
    added = [AddedToken(mark, rstrip=strips, normalized=False, special=True) for mark in marks[not strips :]]
    tokenizer.add_special_tokens([*(["<unk>", "<s>", "</s>"] if strips else []), *added])
    folder, _ = model_folder("phi3", vocab_size=len(vocabulary) + len(added))
    fast = put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    export_gguf(folder.rename(tmp_path / called), tmp_path / "model.gguf", "q8_0")
    runner = run_gguf(tmp_path / "model.gguf")
    chat = "<|user|>\n Who is God?<|end|>\n<|user|>x  y"
    found = runner.llama.tokenize(chat.encode(), add_bos=False, special=True)
    assert found == fast(chat, add_special_tokens=False)["input_ids"]


def test_a_name_does_not_promise_tokens_that_are_left_out(shipped, model_folder, run_gguf, tmp_path):
    from tokenizers import AddedToken

    tokenizer, vocabulary, _ = sentencepiece_like(read_text(shipped / "search.txt")[:5_000])
    marks = [AddedToken(mark, rstrip=True, special=True) for mark in ("<|user|>", "<|endoftext|>")]
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *marks])
    folder, _ = model_folder("phi3", vocab_size=len(vocabulary) + 1)
    put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    export_gguf(folder.rename(tmp_path / "phi3"), tmp_path / "model.gguf", "q8_0")
    assert run_gguf(tmp_path / "model.gguf").llama.metadata["general.name"] == "phi 3"


@pytest.mark.parametrize("from_file", [False, True])
def test_of_several_chat_templates_the_default_is_written(from_file, shipped, model_folder, tmp_path):
    tokenizer, vocabulary, merges = sentencepiece_like(read_text(shipped / "search.txt")[:5_000])
    folder, _ = model_folder("mistral", vocab_size=len(vocabulary))
    fast = put_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    if from_file:
        (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(vocabulary, merges))
        named = [{"name": name, "template": template} for name, template in templates.items()]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    else:
        fast.chat_template = templates
        fast.save_pretrained(folder)
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.chat_template"] == templates["default"]


def test_damaged_sentencepiece_files_are_refused(tmp_path):
    whole = sentencepiece_bytes({"<unk>": 0, "a": 1}, [])
    file = tmp_path / "tokenizer.model"
    file.write_bytes(whole)
    assert read_sentencepiece(file).tokens == {0: ("<unk>", TokenType.UNKNOWN), 1: ("a", TokenType.NORMAL)}
    for damaged in (b"", whole[:7], b"\xff" * 20, message(1, message(1, b"\xff"))):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match="no SentencePiece model"):
            read_sentencepiece(file)
    file.write_bytes(sentencepiece_bytes({"<unk>": 0}, [], algorithm=1))
    with pytest.raises(UnsupportedError, match="no BPE model"):
        read_sentencepiece(file)


def test_more_tokens_than_rows_are_refused(model_folder, tmp_path):
    folder, _ = model_folder("qwen2", vocab_size=2000)
    with pytest.raises(FormatError, match="ids up to 2044, but the embedding has 2000 rows"):
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")


def test_a_folder_without_tokenizer_is_refused(model_folder, tmp_path):
    folder, _ = model_folder("qwen2")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FormatError, match="no tokenizer"):
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []
