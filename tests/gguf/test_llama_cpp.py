"""llama.cpp runs what qkern writes, and computes what transformers computes."""

import numpy as np
import pytest
import torch

from qkern.evaluation import perplexity, read_text, token_ids
from qkern.gguf import GGUFFile
from qkern.pipelines import export_gguf

# llama-cpp-python leaves /dev/null open when it silences llama.cpp.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROMPTS = [
    "In the beginning God",
    "And Moses said unto",
    "Blessed are they",
    "7 kings, 12 sons:\n",
    "The word",
]


def model_and_tokenizer(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def greedy(llama, ids, count, stop):
    llama.reset()
    llama.eval(ids)
    for _ in range(count):
        token = int(np.argmax(llama.scores[len(ids) - 1]))
        ids = [*ids, token]
        if token == stop:
            break
        llama.eval([token])
    return ids


def test_greedy_tokens_equal_those_of_transformers(shipped, exported, run_gguf):
    model, tokenizer = model_and_tokenizer(shipped)
    runner = run_gguf(exported("f32"))
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
        assert greedy(runner.llama, ids[0].tolist(), 20, tokenizer.eos_token_id) == expected


def test_tokens_equal_those_of_transformers(shipped, exported, run_gguf):
    _, tokenizer = model_and_tokenizer(shipped)
    runner = run_gguf(exported("f32"))
    texts = [
        read_text(shipped / "heldout.txt")[:60_000],
        "don't  stop\n\n\tnow, it's 1234567 o'clock -- (really?)  ",
        "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600 \u00b5m\r\n x\u00b2",
    ]
    for text in texts:
        assert runner.tokenize(text).tolist() == tokenizer(text, verbose=False)["input_ids"]
    # Special tokens in text are tokens where the caller says so, and the chat template is the model's.
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    special = runner.llama.tokenize(chat.encode(), add_bos=False, special=True)
    assert special == tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert runner.llama.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert runner.llama.token_eos() == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "kind",
    [
        *("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q2_k", "q3_k_m", "q4_k_m", "q6_k", "iq4_xs"),
        *("f16", "bf16", "f32"),
    ],
)
def test_perplexity_equals_ours_on_the_decoded_weights(kind, shipped, exported, run_gguf):
    model, tokenizer = model_and_tokenizer(shipped)
    path = exported(kind)
    with GGUFFile(path) as file:
        decoded = dict(file.state_dict())
    missing = model.load_state_dict(decoded, strict=False)
    assert missing == (["lm_head.weight"], [])  # tied
    ids = token_ids(tokenizer, read_text(shipped / "heldout.txt")[:40_000])[: 4 * 512]
    ours, theirs = perplexity(model, ids), perplexity(run_gguf(path), ids)
    # llama.cpp quantizes activations to int8 beside quantized weights, and rounds them to 16 bits beside
    # 16-bit ones; with f32 nothing is rounded.
    assert theirs == pytest.approx(ours, rel=1e-5 if kind == "f32" else 5e-3)


VARIANTS = {
    "llama": {},
    "llama-tied-gqa": {"tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 1},
    "llama-rope3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "qwen2-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"head_dim": 32},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant, model_folder, run_gguf, tmp_path):
    folder, model = model_folder(variant.split("-")[0], **VARIANTS[variant])
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    runner = run_gguf(tmp_path / "model.gguf")
    generator = torch.Generator().manual_seed(0)
    for length in (3, 17, 48):
        ids = torch.randint(0, 2000, (1, length), generator=generator)
        with torch.inference_mode():
            expected = model(ids).logits
        error = (runner(ids) - expected).abs().max() / expected.abs().max()
        assert error < 1e-3


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_m", "q6_k", "f16", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_types_equal_those_of_llama_quantize(kind, tied, exported, model_folder, shipped, tmp_path):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'"
    )
    from qkern.gguf import mixture_for

    if tied:
        source, ours = exported("f32"), exported(kind)
    else:
        # Rows of 320 are no multiple of 256: the fallbacks; 10 layers: every branch of the rules for layers.
        folder, _ = model_folder(
            "qwen2", num_hidden_layers=10, hidden_size=256, intermediate_size=320, tie_word_embeddings=False
        )
        source, ours = tmp_path / "f32.gguf", tmp_path / "ours.gguf"
        export_gguf(folder, source, "f32")
        export_gguf(folder, ours, kind)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = mixture_for(kind).file_type
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), parameters) == 0
    with GGUFFile(ours) as file:
        our_types = {name: info.type.name for name, info in file.tensors.items()}
    with GGUFFile(theirs) as file:
        their_types = {name: info.type.name for name, info in file.tensors.items()}
    assert our_types == their_types
