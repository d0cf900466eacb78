"""Packing: every token once, in order, in windows of one length; and what is refused."""

import logging
from types import SimpleNamespace

import pytest
import torch

from qkern.calibration import bounded_length, calibration_hash, make_batches, split_batches
from qkern.errors import InputError


def words(text, verbose=True):
    return {"input_ids": [int(word) for word in text.split()]}


def test_documents_are_joined_and_cut():
    batch = make_batches(words, ["0 1 2", [3, 4], "5 6 7 8"], samples=9, length=4)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_more_windows_than_samples_are_drawn_by_seed():
    ids = [list(range(1000))]
    batch = make_batches(None, ids, samples=10, length=10, seed=0)
    assert batch.shape == (10, 10)
    starts = batch[:, 0]
    assert (starts % 10 == 0).all()
    assert starts.unique().numel() == 10
    assert torch.equal(starts.sort().values, starts)
    assert torch.equal(batch, starts[:, None] + torch.arange(10))
    assert torch.equal(batch, make_batches(None, ids, samples=10, length=10, seed=0))
    assert not torch.equal(batch, make_batches(None, ids, samples=10, length=10, seed=1))


def test_fewer_windows_than_samples_are_logged(caplog):
    with caplog.at_level(logging.INFO, "qkern"):
        assert make_batches(None, [list(range(25))], samples=128, length=10).shape == (2, 10)
    assert "2 sequences of 10 tokens, 128 were asked for" in caplog.text


def test_shorter_than_one_sequence_names_both_numbers():
    with pytest.raises(InputError, match="it has 7 tokens, 2048 are needed"):
        make_batches(None, [list(range(7))], samples=1, length=2048)


def test_ready_sequences_are_taken_as_they_are():
    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    assert make_batches(None, ids, samples=2, length=100).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_batches(None, ids, samples=9, length=3).shape == (3, 3)


def test_what_is_set_aside_is_not_drawn():
    texts = [list(range(40))]
    for samples, aside, drawn, others in ((3, 4, 3, 4), (8, 4, 6, 4), (3, 99, 3, 5), (128, 24, 5, 5)):
        chosen, rest = split_batches(None, texts, samples=samples, aside=aside, length=4)
        assert (len(chosen), len(rest)) == (drawn, others)
        assert torch.equal(chosen, make_batches(None, texts, samples=drawn, length=4))
        assert len({*chosen[:, 0].tolist(), *rest[:, 0].tolist()}) == drawn + others
    with pytest.raises(InputError, match="holds one sequence of 40 tokens"):
        split_batches(None, texts, samples=1, aside=1, length=40)


@pytest.mark.parametrize(
    "ids", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(0, 4).long()]
)
def test_bad_ready_sequences(ids):
    with pytest.raises(InputError, match="integer tensor"):
        make_batches(None, ids)


def test_ids_outside_the_vocabulary():
    with pytest.raises(InputError, match="from 0 to 9 but the model's vocabulary has 9"):
        make_batches(None, [list(range(10))], samples=1, length=10, vocabulary=9)
    assert make_batches(None, [list(range(10))], samples=1, length=10, vocabulary=10).shape == (1, 10)


def test_texts_need_a_tokenizer_and_samples_a_number():
    with pytest.raises(InputError, match="needs a tokenizer"):
        make_batches(None, ["text"], samples=1, length=2)
    with pytest.raises(InputError, match="samples must be at least 1"):
        make_batches(None, [[1, 2]], samples=0, length=2)


def test_length_is_bounded_by_the_model(caplog):
    text = SimpleNamespace(max_position_embeddings=512)
    config = SimpleNamespace(get_text_config=lambda: text)
    with caplog.at_level(logging.INFO, "qkern"):
        assert bounded_length(config, 2048) == 512
    assert "512 tokens instead of 2048" in caplog.text
    assert bounded_length(config, 100) == 100
    text.max_position_embeddings = None
    assert bounded_length(config, 2048) == 2048
    with pytest.raises(InputError, match="at least 2"):
        bounded_length(config, 1)


def test_hash_tells_calibrations_apart():
    ids = torch.arange(12)
    assert calibration_hash(ids.reshape(3, 4)) == calibration_hash(ids.reshape(3, 4).clone())
    assert calibration_hash(ids.reshape(3, 4)) != calibration_hash(ids.reshape(4, 3))
    assert calibration_hash(ids.reshape(3, 4)) != calibration_hash(ids.flip(0).reshape(3, 4))
