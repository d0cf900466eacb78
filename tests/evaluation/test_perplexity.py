import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qkern import InputError, QuantLinear
from qkern.evaluation import kl_divergence, perplexity, read_text, token_ids, token_losses
from qkern.evaluation.windows import bos_if_added, split_windows
from qkern.ops import dequantize_groupwise

VOCABULARY = 11


def bigram_logits(ids):
    """A model whose prediction depends on the current token and on its position in the window."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    position = torch.arange(ids.shape[1]).view(1, -1, 1)
    return table[ids] * (1 + 0.1 * position)


def random_ids(length):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def by_hand(ids, window, bos):
    """The rule of the perplexity tool of llama.cpp, one token at a time."""
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        context = ids[start : start + window].clone()
        if bos is not None:
            context[0] = bos
        logits = bigram_logits(context[None])[0].double()
        for position in range(window // 2, window - 1):
            target = ids[start + position + 1]
            losses.append(-torch.log_softmax(logits[position], 0)[target].item())
    return losses


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("window", [4, 7, 16])
def test_equals_the_rule_of_llama_cpp(window, bos):
    ids = random_ids(100)
    expected = by_hand(ids, window, bos)
    losses = token_losses(bigram_logits, ids, window=window, bos=bos, batch_size=3)
    assert losses.shape == (100 // window, window - window // 2 - 1)
    np.testing.assert_allclose(losses.ravel(), expected, rtol=1e-6)
    found = perplexity(bigram_logits, ids, window=window, bos=bos)
    assert found == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    def uniform(ids):
        return torch.zeros(*ids.shape, VOCABULARY)

    assert perplexity(uniform, random_ids(64), window=8) == pytest.approx(VOCABULARY)


def test_batch_size_does_not_matter():
    ids = random_ids(200)
    results = [token_losses(bigram_logits, ids, window=16, batch_size=size) for size in (1, 5, 100)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)
    np.testing.assert_allclose(results[0], results[2], rtol=1e-12)


class Probe(nn.Module):
    """Records how it was called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, ids):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return bigram_logits(ids) * self.scale


def test_module_runs_in_evaluation_mode_and_is_left_as_it_was():
    model = Probe().train()
    perplexity(model, random_ids(64), window=16, batch_size=2)
    assert model.calls == [(False, False)] * 2
    assert model.training


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.head = QuantLinear.from_linear(nn.Linear(32, VOCABULARY), "w4g16")

    def forward(self, ids):
        return self.head(self.embedding(ids) * 3)


def test_activations_stay_float_unless_int8_is_named():
    model, ids = Quantized(), random_ids(200)
    dense = nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        dense.weight.copy_(dequantize_groupwise(model.head.quantized()))
        dense.bias.copy_(model.head.bias)
    expected = perplexity(nn.Sequential(model.embedding, Times3(), dense), ids, window=16)
    assert perplexity(model, ids, window=16) == pytest.approx(expected, rel=1e-5)
    assert model.head.compute == "auto"
    int8 = perplexity(model, ids, window=16, compute="int8")
    assert abs(int8 / expected - 1) > 1e-5
    # One model against itself: the reference runs in float, the other side in int8.
    divergence = kl_divergence(model, model, ids, window=16, compute="int8", allow_short=True)
    assert divergence.mean() > 1e-7
    assert kl_divergence(model, model, ids, window=16, allow_short=True).max() == 0


class Times3(nn.Module):
    def forward(self, x):
        return x * 3


def test_short_text_names_both_lengths():
    with pytest.raises(InputError, match="got 15 tokens, a window has 16"):
        perplexity(bigram_logits, random_ids(15), window=16)


def test_wrong_ids_and_windows():
    with pytest.raises(InputError, match="one row of integer token ids"):
        split_windows(torch.zeros(4, 4), 4, None)
    with pytest.raises(InputError, match="at least 4"):
        split_windows(random_ids(8), 3, None)
    with pytest.raises(InputError, match="batch_size"):
        perplexity(bigram_logits, random_ids(64), window=16, batch_size=0)


def test_wrong_logits():
    with pytest.raises(InputError, match=r"logits \[B, T, V\]"):
        perplexity(lambda ids: torch.zeros(ids.shape[0], VOCABULARY), random_ids(64), window=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(value):
    def broken(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[0, 6] = value
        return logits

    with pytest.raises(InputError, match="no finite loss for 1 of 3 scored tokens"):
        perplexity(broken, random_ids(8), window=8)


def test_window_beyond_the_context():
    class Model(nn.Module):
        config = SimpleNamespace(max_position_embeddings=8)

        def forward(self, ids):
            return bigram_logits(ids)

    assert perplexity(Model(), random_ids(64), window=8) > 0
    with pytest.raises(InputError, match="got 9 tokens, Model reads 8; give a smaller window"):
        perplexity(Model(), random_ids(64), window=9)


def test_split_does_not_write_to_the_ids():
    ids = random_ids(16)
    before = ids.clone()
    assert split_windows(ids, 8, 5)[:, 0].tolist() == [5, 5]
    assert torch.equal(ids, before)


class Tokenizer:
    bos_token_id = 1

    def __init__(self, adds_bos):
        self.adds_bos = adds_bos

    def __call__(self, text, **_):
        return {"input_ids": [1] * self.adds_bos + [ord(letter) for letter in text]}


def test_bos_is_replaced_only_where_the_tokenizer_adds_it():
    assert bos_if_added(Tokenizer(True)) == 1
    assert bos_if_added(Tokenizer(False)) is None
    assert token_ids(Tokenizer(True), "ab").tolist() == [1, 97, 98]


def test_unreadable_texts(tmp_path):
    with pytest.raises(InputError, match="cannot read the text file"):
        read_text(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_text(tmp_path / "latin.txt")
