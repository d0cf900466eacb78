import numpy as np
import pytest
import torch

from qkern import InputError
from qkern.evaluation import MIN_POSITIONS, kl_divergence, paired_bootstrap, window_logits
from qkern.evaluation.kl import text_block

VOCABULARY = 13


def model(seed, noise=0.0):
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    table += noise * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


def random_ids(length):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def test_is_the_definition_at_every_position():
    ids = random_ids(70)
    found = kl_divergence(model(0), model(2, 0.3), ids, window=16, batch_size=3, allow_short=True)
    assert found.shape == (64,)
    p = torch.softmax(model(0)(ids[:64]).double(), -1)
    q = torch.softmax(model(2, 0.3)(ids[:64]).double(), -1)
    np.testing.assert_allclose(found, (p * (p / q).log()).sum(-1).numpy(), rtol=1e-6)


def test_is_zero_for_the_same_model_and_not_symmetric():
    ids = random_ids(64)
    arguments = {"window": 16, "allow_short": True}
    assert kl_divergence(model(0), model(0), ids, **arguments).max() == 0
    forth = kl_divergence(model(0), model(2, 1.0), ids, **arguments).mean()
    back = kl_divergence(model(2, 1.0), model(0), ids, **arguments).mean()
    assert forth > 0
    assert abs(forth - back) > 1e-3 * forth


def test_tiny_differences_survive():
    # KL of a small logit error is half its variance; fp32 log-probabilities would drown it.
    ids = random_ids(256)
    mean = kl_divergence(model(0), model(2, 1e-5), ids, window=16, allow_short=True).mean()
    assert 1e-11 < mean < 1e-10


def test_certain_predictions_are_finite():
    def certain(ids):
        return torch.nn.functional.one_hot(ids, VOCABULARY).float() * torch.finfo(torch.float32).max

    found = kl_divergence(certain, certain, random_ids(16), window=16, allow_short=True)
    assert (found == 0).all()


def masked(seed, noise=0.0):
    def run(ids):
        logits = model(seed, noise)(ids).clone()
        logits[..., 3] = -torch.inf
        return logits

    return run


def test_tokens_that_are_impossible_for_both_cost_nothing():
    ids = random_ids(64)
    found = kl_divergence(masked(0), masked(2, 0.3), ids, window=16, allow_short=True)
    p = torch.softmax(masked(0)(ids).double(), -1)
    q = torch.softmax(masked(2, 0.3)(ids).double(), -1)
    kept = [i for i in range(VOCABULARY) if i != 3]
    expected = (p * (p / q).log())[:, kept].sum(-1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isfinite(kl_divergence(masked(0), model(2, 0.3), ids, window=16, allow_short=True)).all()


@pytest.mark.parametrize("broken", [masked(2), lambda ids: model(2)(ids) * torch.nan])
def test_divergences_that_are_not_finite_are_refused(broken):
    with pytest.raises(InputError, match="not finite at 64 of 64"):
        kl_divergence(model(0), broken, random_ids(64), window=16, allow_short=True)


def test_reference_logits_give_the_same_and_are_checked():
    ids = random_ids(80)
    logits = window_logits(model(0), ids, window=16, batch_size=2)
    assert logits.shape == (80, VOCABULARY)
    assert logits.dtype == torch.float32
    arguments = {"window": 16, "allow_short": True}
    direct = kl_divergence(model(0), model(2, 0.3), ids, **arguments)
    np.testing.assert_array_equal(kl_divergence(logits, model(2, 0.3), ids, **arguments), direct)
    with pytest.raises(InputError, match="one row a position: got 79 rows for 80"):
        kl_divergence(logits[1:], model(0), ids, **arguments)
    with pytest.raises(InputError, match="share a vocabulary"):
        kl_divergence(logits[:, 1:], model(0), ids, **arguments)


def test_too_few_positions_are_refused():
    with pytest.raises(InputError, match=f"at least {MIN_POSITIONS}"):
        kl_divergence(model(0), model(0), random_ids(MIN_POSITIONS - 1), window=16)
    long_enough = kl_divergence(model(0), model(0), random_ids(MIN_POSITIONS + 8), window=16, batch_size=64)
    assert len(long_enough) == (MIN_POSITIONS + 8) // 16 * 16


class TestPairedBootstrap:
    def test_matches_the_normal_interval(self):
        generator = np.random.default_rng(3)
        first, second = generator.normal(1.0, 1, 4000), generator.normal(1.1, 1, 4000)
        mean, low, high = paired_bootstrap(first, second)
        difference = first - second
        half = 1.96 * difference.std() / np.sqrt(difference.size)
        assert mean == pytest.approx(difference.mean())
        assert low == pytest.approx(mean - half, abs=0.1 * half)
        assert high == pytest.approx(mean + half, abs=0.1 * half)

    def test_covers_the_truth_95_times_in_100(self):
        generator = np.random.default_rng(4)
        covered = 0
        for _ in range(300):
            sample = generator.exponential(size=(2, 200))
            _, low, high = paired_bootstrap(sample[0], sample[1], resamples=400)
            covered += low <= 0 <= high
        # Binomial(300, 0.95) lies in 270..297 with probability above 0.999.
        assert 270 <= covered <= 297

    def test_pairs_are_resampled_together(self):
        common = np.random.default_rng(5).normal(0, 100, 500)
        interval = paired_bootstrap(common, common + 0.01)
        assert interval.is_below
        assert interval.high == pytest.approx(-0.01)

    @pytest.mark.parametrize(
        ("windows", "window", "block"),
        [(1, 512, 32), (2, 512, 64), (15, 512, 256), (16, 512, 512), (30, 512, 512), (1, 8, 1), (3, 6, 1)],
    )
    def test_few_windows_are_resampled_in_parts(self, windows, window, block):
        assert text_block(windows, window) == block

    def test_blocks_are_resampled_together(self):
        # Positions of a window are alike: one interval is that of the windows, the other is too narrow.
        generator = np.random.default_rng(7)
        windows = generator.normal(size=100)
        first = np.repeat(windows, 50) + 0.1 * generator.normal(size=5000)
        _, low, high = paired_bootstrap(first, np.zeros(5000), block=50)
        _, narrow_low, narrow_high = paired_bootstrap(first, np.zeros(5000))
        half = 1.96 * windows.std() / 10
        assert high - low == pytest.approx(2 * half, rel=0.1)
        assert narrow_high - narrow_low == pytest.approx(2 * half / 50**0.5, rel=0.2)

    def test_runs_are_resampled_apart(self):
        generator = np.random.default_rng(8)
        shared = generator.normal(size=1000)
        runs = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
        first = shared + runs[:, None]
        mean, low, high = paired_bootstrap(first, shared)
        assert mean == pytest.approx(0)
        half = 1.96 * runs.std() / 5**0.5
        assert high - low == pytest.approx(2 * half, rel=0.1)
        # Two samples vary by themselves, whatever the order of their runs.
        _, low, high = paired_bootstrap(first, first)
        assert high - low == pytest.approx(2 * 2**0.5 * half, rel=0.1)
        one, other = paired_bootstrap(first[:1], shared), paired_bootstrap(first[0], shared)
        assert one == other

    def test_seed_and_confidence(self):
        generator = np.random.default_rng(6)
        first, second = generator.normal(size=500), generator.normal(size=500)
        assert paired_bootstrap(first, second, seed=1) == paired_bootstrap(first, second, seed=1)
        assert paired_bootstrap(first, second, seed=1) != paired_bootstrap(first, second, seed=2)
        wide, narrow = (paired_bootstrap(first, second, confidence=level) for level in (0.99, 0.5))
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
        assert not wide.is_below

    def test_errors(self):
        with pytest.raises(InputError, match=r"paired and not empty, .*: got \[2\] and \[3\] values"):
            paired_bootstrap([1, 2], [1, 2, 3])
        with pytest.raises(InputError, match=r"got \[0\] and \[0\]"):
            paired_bootstrap([], [])
        with pytest.raises(InputError, match="block must divide the positions: got 2 for 3 of them"):
            paired_bootstrap([1, 2, 3], [1, 2, 3], block=2)
        with pytest.raises(InputError, match="one block of 3 says nothing of others"):
            paired_bootstrap([1, 2, 3], [2, 3, 4], block=3)
        with pytest.raises(InputError, match="confidence"):
            paired_bootstrap([1], [1], confidence=1.0)
