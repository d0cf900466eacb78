"""KL and agreement through a file: the same as with both models in memory."""

import numpy as np
import pytest
import torch

from qkern import InputError
from qkern.evaluation import kl_divergence, paired_bootstrap, perplexity
from qkern.evaluation.perplexity import token_losses, with_error
from qkern.evaluation.reference import ReferenceReader, ReferenceWriter
from qkern.evaluation.scoring import score

V, WINDOW = 300, 16
IDS = torch.randint(0, V, (5 * WINDOW + 3,), generator=torch.Generator().manual_seed(0))
POSITIONS = 5 * WINDOW


def model(seed, scale=2.0, vocabulary=V):
    table = scale * torch.randn(V, vocabulary, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


def near(seed, noise):
    original = model(0)
    table = noise * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
    return lambda ids: original(ids) + table[ids]


def written(path, limit=1 << 30):
    with ReferenceWriter(path, POSITIONS, limit) as writer:
        found = score(model(0), IDS, window=WINDOW, reference=writer)
    assert (found.kl, found.agreement) == (None, None)
    return found


def test_all_of_the_distribution(tmp_path):
    original = written(tmp_path / "reference.bin")
    assert original.perplexity == perplexity(model(0), IDS, window=WINDOW)
    reader = ReferenceReader(tmp_path / "reference.bin")
    found = score(near(1, 0.5), IDS, window=WINDOW, reference=reader)
    assert (reader.kept, reader.vocabulary) == (V, V)
    expected = kl_divergence(model(0), near(1, 0.5), IDS, window=WINDOW, allow_short=True)
    np.testing.assert_array_equal(reader.kl, expected)
    assert found.kl == paired_bootstrap(expected, np.zeros_like(expected), window=WINDOW)
    assert found.positions == len(expected) == POSITIONS
    losses = token_losses(near(1, 0.5), IDS, window=WINDOW)
    assert (found.perplexity, found.standard_error) == with_error(losses)
    assert found.scored_tokens == losses.size
    windows = IDS[:POSITIONS].view(5, WINDOW)
    same = model(0)(windows).argmax(-1) == near(1, 0.5)(windows).argmax(-1)
    assert 0 < found.agreement < 1
    assert found.agreement == float(same.double().mean())


@pytest.mark.parametrize("kept", [V // 2 - 1, 100, 1])
def test_the_likeliest_and_the_rest_as_one_bound_it_from_below(tmp_path, kept):
    path = tmp_path / "reference.bin"
    written(path, limit=8 * POSITIONS * kept)
    assert path.stat().st_size == 8 * POSITIONS * kept
    reader = ReferenceReader(path)
    found = score(near(1, 0.5), IDS, window=WINDOW, reference=reader)
    assert reader.kept == kept
    full = kl_divergence(model(0), near(1, 0.5), IDS, window=WINDOW, allow_short=True)
    # Against the formula, in float64 from both models.
    windows = IDS[:POSITIONS].view(5, WINDOW)
    p = torch.log_softmax(model(0)(windows).double(), -1).flatten(0, 1)
    q = torch.log_softmax(near(1, 0.5)(windows).double(), -1).flatten(0, 1)
    top, tokens = p.topk(kept)
    chosen = q.gather(-1, tokens)
    rest_p, rest_q = 1 - top.exp().sum(-1), 1 - chosen.exp().sum(-1)
    expected = (top.exp() * (top - chosen)).sum(-1) + rest_p * (rest_p / rest_q).log()
    np.testing.assert_allclose(reader.kl, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert (reader.kl <= full + 1e-6).all()
    assert found.kl.mean == pytest.approx(full.mean(), rel=0.1 if kept > 99 else 1)
    exact = tmp_path / "exact.bin"
    written(exact)
    assert (
        found.agreement == score(near(1, 0.5), IDS, window=WINDOW, reference=ReferenceReader(exact)).agreement
    )


def test_the_original_itself_is_at_zero(tmp_path):
    written(tmp_path / "reference.bin")
    found = score(model(0), IDS, window=WINDOW, reference=ReferenceReader(tmp_path / "reference.bin"))
    assert (found.kl.mean, found.agreement) == (0, 1)


def test_an_unfinished_file_is_none(tmp_path):
    path = tmp_path / "reference.bin"

    def broken(ids):
        raise RuntimeError

    with pytest.raises(RuntimeError), ReferenceWriter(path, POSITIONS, 1 << 30) as writer:
        score(broken, IDS, window=WINDOW, reference=writer)
    assert path.exists()
    assert not ReferenceReader.is_there(path)
    written(path)
    assert ReferenceReader.is_there(path)


def test_other_vocabularies_and_nan_are_refused(tmp_path):
    path = tmp_path / "reference.bin"
    written(path)
    with pytest.raises(InputError, match="share a vocabulary: got 300 and 301"):
        score(model(1, vocabulary=V + 1), IDS, window=WINDOW, reference=ReferenceReader(path))

    def broken(ids):  # at a position that has no loss
        logits = model(1)(ids).clone()
        logits[:, 0] = torch.nan
        return logits

    with pytest.raises(InputError, match="not finite at 5 of 80"):
        score(broken, IDS, window=WINDOW, reference=ReferenceReader(path))
