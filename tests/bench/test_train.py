"""The script that makes the test models: its n-gram baseline, and a run of two steps."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

MODELS = Path(__file__).parents[2] / "bench" / "models"


@pytest.fixture
def models(monkeypatch):
    """Import a file of bench/models, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(MODELS))
    return importlib.import_module


@pytest.fixture
def kneser_ney(models):
    return models("kneser_ney")


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_probabilities_sum_to_one(kneser_ney, order):
    tokens = np.random.default_rng(0).zipf(1.5, 4000) % 50
    model = kneser_ney.KneserNey(tokens, vocab=50, order=order)
    model.check(tokens)


def test_kneser_ney_equals_the_formula_on_a_small_bigram(kneser_ney):
    tokens = np.array([0, 1, 0, 1, 0, 2, 1, 0, 0, 1, 2, 0])
    model = kneser_ney.KneserNey(tokens, vocab=4, order=2)
    bigrams = list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    counts = {gram: bigrams.count(gram) for gram in set(bigrams)}
    before = [len({a for a, b in counts if b == w}) for w in range(4)]

    def discounts(values):
        n = [max(sum(v == c for v in values), 1) for c in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        return [
            0.0,
            *(min(max(c - (c + 1) * y * n[c] / n[c - 1], 0.0), float(c)) for c in (1, 2, 3)),
        ]

    low, high = discounts([c for c in before if c]), discounts(counts.values())
    kept_low = sum(low[min(c, 3)] for c in before) / sum(before)
    for a in range(3):
        row = [counts.get((a, w), 0) for w in range(4)]
        kept = sum(high[min(c, 3)] for c in row) / sum(row)
        for w in range(4):
            unigram = (before[w] - low[min(before[w], 3)]) / sum(before) + kept_low / 4
            expected = (row[w] - high[min(row[w], 3)]) / sum(row) + kept * unigram
            got = model.probabilities(np.array([[a]]), np.array([w]))[0]
            assert got == pytest.approx(expected, rel=1e-12)


def test_two_steps_write_a_model_folder(tmp_path):
    output = tmp_path / "model"
    command = [sys.executable, MODELS / "train.py", "smoke", "--output", output]
    done = subprocess.run(
        [*command, "--steps", "2", "--threads", "1"], check=True, capture_output=True, text=True
    )
    figures = json.loads(done.stdout)
    assert figures["heldout_perplexity"] > figures["kneser_ney_3"] > 1

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    texts = [(output / f"{name}.txt").read_text() for name in ("calibration", "search", "heldout")]
    assert all(len(tokenizer(text).input_ids) > 1000 for text in texts)
    paragraphs = [set(text.strip().split("\n\n")) for text in texts]
    assert sum(map(len, paragraphs)) == len(set.union(*paragraphs))


def test_a_missing_debian_package_is_named(models, monkeypatch, tmp_path):
    corpus = models("corpus")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(corpus.MissingSourceError, match="apt-get install bible-kjv bible-kjv-text"):
        corpus.bible()
