"""BERT encoders: llama.cpp gives the embeddings that transformers gives, from the text on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.gguf import GGUFFile, Imatrix, ImatrixEntry
from qkern.pipelines import export_gguf

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TEXTS = [
    "In the beginning, God created the heaven and the earth.",
    "7 kings;  12 sons -- caf\u00e9 na\u00efve (\u4f60\u597d)\n\tWho?",
    "Blessed are they that mourn: for they shall be comforted.",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces(*, lowercase=True, strip_accents=None):
    """A small WordPiece tokenizer as BERT has it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789\u00e9\u00ef\u4f60\u597d"
    words = ["in", "the", "god", "created", "earth", "kings", "are", "they", "God", "caf", "na"]
    parts = ["##ing", "##ed", "##en", "##s", "##ve", "##th"]
    tokens = [*SPECIAL, *words, *parts, *".,;:()-?!'", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(
        models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture
def encoder_folder(tmp_path_factory):
    """Maker of folders with a tiny random BERT: ``encoder_folder(pooling="mean")``."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    def make(*, tokenizer=None, pooling=None, **overrides):
        folder = tmp_path_factory.mktemp("bert")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer or word_pieces(),
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL},
        )
        fast.save_pretrained(folder)
        settings = {"vocab_size": len(fast) + 3, "hidden_size": 64, "intermediate_size": 96}
        settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
        torch.manual_seed(0)
        model = BertModel(BertConfig(**{**settings, **overrides})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.08))
        model.save_pretrained(folder)
        if pooling is not None:
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
            kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
            modules = [
                {"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()
            ]
            (folder / "modules.json").write_text(json.dumps(modules))
        return folder, model, fast

    return make


def embeddings(path, texts):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'"
    )
    llama = llama_cpp.Llama(
        model_path=str(path),
        embedding=True,
        n_ctx=128,
        n_batch=128,
        n_ubatch=128,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    return [torch.tensor(llama.embed(text)) for text in texts]


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() / expected.abs().max() < 1e-3


@torch.inference_mode()
def hidden_states(model, fast, text):
    return model(**fast(text, return_tensors="pt")).last_hidden_state[0]


CASED = {"lowercase": False}
ACCENTS = {"lowercase": True, "strip_accents": False}


@pytest.mark.parametrize("normalizer", [{}, CASED, ACCENTS], ids=["uncased", "cased", "accents"])
def test_token_embeddings_equal_those_of_transformers(normalizer, encoder_folder, tmp_path):
    folder, model, fast = encoder_folder(tokenizer=word_pieces(**normalizer))
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    for text, found in zip(TEXTS, embeddings(tmp_path / "model.gguf", TEXTS), strict=True):
        assert_close(found, hidden_states(model, fast, text))


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_quantized_files_run(kind, encoder_folder, tmp_path):
    folder, model, fast = encoder_folder(hidden_size=256)
    export_gguf(folder, tmp_path / "model.gguf", kind)
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert model.load_state_dict(dict(file.state_dict()), strict=False).unexpected_keys == []
    for text, found in zip(TEXTS, embeddings(tmp_path / "model.gguf", TEXTS), strict=True):
        expected = hidden_states(model, fast, text)
        # llama.cpp rounds activations: to int8 beside quantized weights, to 16 bits beside 16-bit ones.
        assert (found - expected).norm() / expected.norm() < (0.005 if kind == "f16" else 0.05)


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda states: states.mean(0)),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, lambda states: states[0]),
        ({"pooling_mode": "cls"}, lambda states: states[0]),
    ],
    ids=["mean", "cls", "new cls"],
)
def test_pooled_embeddings(pooling, pool, encoder_folder, tmp_path):
    folder, model, fast = encoder_folder(pooling=pooling)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    for text, found in zip(TEXTS, embeddings(tmp_path / "model.gguf", TEXTS), strict=True):
        assert_close(found, pool(hidden_states(model, fast, text)))


def test_an_older_checkpoint_with_heads_gives_the_same_file(encoder_folder, tmp_path):
    folder, _, _ = encoder_folder()
    export_gguf(folder, tmp_path / "new.gguf", "f32")
    renames = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    older = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for new, old in renames.items():
            name = name.replace(new, old)
        older[f"bert.{name}"] = tensor
    older |= {"cls.predictions.bias": torch.zeros(9), "bert.embeddings.position_ids": torch.arange(128)[None]}
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    export_gguf(folder, tmp_path / "old.gguf", "f32")
    assert (tmp_path / "old.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


def test_f32_weights_come_back(encoder_folder, tmp_path):
    folder, model, _ = encoder_folder()
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    with GGUFFile(tmp_path / "model.gguf") as file:
        weights = dict(file.state_dict())
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    assert set(weights) == set(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_activations_of_an_encoder_are_not_collected(encoder_folder, tmp_path, monkeypatch):
    folder, _, _ = encoder_folder(hidden_size=256)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    monkeypatch.setattr("qkern.pipelines.source.meta_model", lambda *_: pytest.fail("it was opened"))
    message = r"bert is an encoder, .*: export it without calibration"
    for options in ({}, {"method": "gptq"}, {"method": "awq"}, {"dry_run": True}):
        with pytest.raises(UnsupportedError, match=message):
            export_gguf(folder, tmp_path / "model.gguf", "q4_0", calibration=ids, **options)
    with pytest.raises(UnsupportedError, match=message):
        qkern.imatrix(folder, calibration=ids, output=tmp_path / "matrix.gguf")
    assert list(tmp_path.iterdir()) == []
    # What another tool collected is taken.
    entry = ImatrixEntry(sums=torch.rand(1, 256), counts=torch.ones(1, dtype=torch.int64))
    matrix = Imatrix(entries={"blk.0.attn_q.weight": entry}, chunk_count=1, chunk_size=16)
    export_gguf(folder, tmp_path / "model.gguf", "q4_0", imatrix=matrix)


def test_an_added_token_without_a_row_is_left_out(encoder_folder, tmp_path, caplog):
    tokenizer = word_pieces()
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<extra>"])
    folder, _, fast = encoder_folder(tokenizer=tokenizer, vocab_size=rows)
    fast.mask_token = "<extra>"
    fast.save_pretrained(folder)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert ": <extra> have no row in the embedding and are left out" in caplog.text
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert len(file.metadata["tokenizer.ggml.tokens"]) == rows
        assert "tokenizer.ggml.mask_token_id" not in file.metadata
        assert file.metadata["tokenizer.ggml.seperator_token_id"] == 3
        assert file.metadata["tokenizer.ggml.add_bos_token"] is True


def test_a_pre_tokenizer_of_an_encoder_is_refused(encoder_folder, tmp_path):
    folder, _, _ = encoder_folder()
    with pytest.raises(InputError, match=r"'gpt-2' is for byte-level tokenizers, .*kind 'bert'"):
        export_gguf(folder, tmp_path / "model.gguf", "f32", pre_tokenizer="gpt-2")


def test_what_llama_cpp_does_not_compute_is_refused(encoder_folder, tmp_path):
    from tokenizers import pre_tokenizers

    def refused(message, error=UnsupportedError, **settings):
        folder, _, _ = encoder_folder(**settings)
        with pytest.raises(error, match=message):
            export_gguf(folder, tmp_path / "model.gguf", "f32")
        assert list(tmp_path.iterdir()) == []
        return folder

    refused("hidden_act 'relu' .*allowed is 'gelu'", hidden_act="relu")
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    refused("pools by one of cls, mean, lasttoken", pooling=both)
    refused("pools by one of", pooling={"pooling_mode": "max"})
    refused("pools by one of", pooling={"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    tokenizer = word_pieces()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    refused("WordPiece tokenizer is not BERT's", tokenizer=tokenizer)

    folder, _, _ = encoder_folder(pooling={"pooling_mode_mean_tokens": True})
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(
        json.dumps([*modules, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}])
    )
    with pytest.raises(UnsupportedError, match="modules that are not exported to GGUF: Dense"):
        export_gguf(folder, tmp_path / "model.gguf", "f32")

    folder, _, _ = encoder_folder()
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match=r"architectures .*SequenceClassification.*allowed is .*BertModel"
    ):
        export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("modules.json", "{}", FormatError, "must hold a JSON list: got dict"),
        (
            "modules.json",
            '[{"type": "sentence_transformers.models.Pooling"}]',
            FormatError,
            "KeyError: 'path'",
        ),
        ("modules.json", "[3]", FormatError, "is not as its library writes it"),
        ("1_Pooling/config.json", "[]", FormatError, "must hold a JSON object: got list"),
        ("1_Pooling/config.json", None, FormatError, "is missing"),
        ("1_Pooling/config.json", '{"pooling_mode": ["cls"]}', UnsupportedError, "pools by one of"),
    ],
)
def test_damaged_files_of_the_pooling_are_named(file, content, error, message, encoder_folder, tmp_path):
    folder, _, _ = encoder_folder(pooling={"pooling_mode": "cls"})
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(error, match=rf"{file}.*{message}"):
        export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_has_no_perplexity(encoder_folder, tmp_path):
    pytest.importorskip("llama_cpp")
    from qkern.evaluation.llama_cpp import LlamaCpp

    folder = encoder_folder()[0]
    export_gguf(folder, tmp_path / "bert.gguf", "f16")
    with pytest.raises(UnsupportedError, match=r"bert\.gguf is an encoder \(bert\): it makes embeddings"):
        LlamaCpp(tmp_path / "bert.gguf")
