"""Greedy text and speed through the two decoders."""

import pytest
import torch

import qkern
from qkern import InputError
from qkern.demo import HELDOUT, MODEL
from qkern.evaluation import decoding, read_text, token_ids
from qkern.evaluation.decoding import TransformersDecoder, continued, measure_speed
from qkern.evaluation.llama_cpp import LlamaCpp

TEXT = read_text(HELDOUT)[:3000]


@pytest.fixture(scope="module")
def model():
    return qkern.load(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids():
    from transformers import AutoTokenizer

    return token_ids(AutoTokenizer.from_pretrained(MODEL), TEXT)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("gguf") / "model-f32.gguf"
    qkern.export_gguf(MODEL, path, "f32")
    return path


def test_continues_as_generate_does(model, ids):
    prompt = ids[:20]
    expected = model.generate(prompt[None], do_sample=False, max_new_tokens=12, min_new_tokens=12)
    assert continued(TransformersDecoder(model), prompt, 12) == expected[0, 20:].tolist()


def test_a_prompt_in_portions_gives_the_logits_of_the_whole(model, ids, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 7)
    decoder = TransformersDecoder(model)
    with torch.no_grad():
        expected = model(ids[None, :41]).logits[0]
    torch.testing.assert_close(decoder.prefill(ids[:40]), expected[39], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.step(int(ids[40])), expected[40], rtol=1e-4, atol=1e-4)
    # A new prompt forgets the old one.
    torch.testing.assert_close(decoder.prefill(ids[:5]), expected[4], rtol=1e-4, atol=1e-4)


def test_llama_cpp_decodes_what_transformers_does(gguf, model, ids):
    llama = LlamaCpp(gguf, context=512, f32_cache=True, logits_all=False)
    ours = TransformersDecoder(model)
    # 600 tokens would be two portions; the model reads 512.
    torch.testing.assert_close(llama.prefill(ids[:500]), ours.prefill(ids[:500]), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(llama.step(7), ours.step(7), rtol=1e-3, atol=2e-3)
    assert continued(llama, ids[:20], 12) == continued(ours, ids[:20], 12)
    assert set(model.generation_config.eos_token_id) <= llama.ends
    assert llama.detokenize(llama.tokenize("And he said").tolist()) == "And he said"


class Scripted:
    """A decoder that says tokens in turn, and counts what it is asked."""

    context = 100

    def __init__(self, tokens):
        self.tokens, self.prompts, self.steps = list(tokens), [], 0

    def _next(self):
        self.at += 1
        return torch.nn.functional.one_hot(torch.tensor(self.tokens[self.at % len(self.tokens)]), 50)

    def prefill(self, ids):
        self.prompts.append(ids.tolist())
        self.at = -1
        return self._next()

    def step(self, token):
        assert token == self.tokens[self.at % len(self.tokens)]
        self.steps += 1
        return self._next()


def test_text_ends_before_its_end_token_and_at_its_length():
    ids = torch.tensor([1, 2])
    assert continued(Scripted([5, 6, 9, 7]), ids, 10, ends={9}) == [5, 6]
    assert continued(Scripted([9]), ids, 10, ends={9}) == []
    decoder = Scripted([5, 6, 7, 8])
    assert continued(decoder, ids, 3) == [5, 6, 7]
    assert decoder.steps == 2


def test_speed_repeats_the_text_and_counts_its_runs():
    decoder = Scripted([5, 6])
    speed = measure_speed(decoder, torch.tensor([1, 2, 3]), 7, 4)
    assert decoder.prompts == [[1, 2, 3, 1, 2, 3, 1]] * decoding.REPETITIONS
    assert decoder.steps == 4 * decoding.REPETITIONS
    assert (speed.prompt, speed.runs, speed.absent) == (7, decoding.REPETITIONS, None)
    assert speed.prefill > 0
    assert speed.decode > 0


def test_a_slow_prompt_is_read_once(monkeypatch):
    monkeypatch.setattr(decoding, "_ENOUGH_SECONDS", 0.0)
    decoder = Scripted([5])
    speed = measure_speed(decoder, torch.tensor([1]), 2, 1)
    assert speed.runs == len(decoder.prompts) == 1
    assert (speed.prefill_spread, speed.decode_spread) == (0, 0)


def test_what_does_not_fit_is_said():
    decoder = Scripted([5])
    speed = measure_speed(decoder, torch.tensor([1]), 97, 4)
    assert (speed.runs, decoder.prompts) == (0, [])
    assert speed.absent == "the model reads 100 tokens, 4 new ones among them"
    assert measure_speed(decoder, torch.tensor([1]), 96, 4).absent is None
    with pytest.raises(InputError, match="no tokens"):
        continued(decoder, torch.tensor([], dtype=torch.int64), 4)
    with pytest.raises(InputError, match="reads 100 tokens"):
        continued(decoder, torch.ones(99, dtype=torch.int64), 4)
