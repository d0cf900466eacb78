import numpy as np
import pytest
import torch

from qkern import InputError
from qkern.evaluation import MIN_POSITIONS, kl_divergence, paired_bootstrap, window_logits

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

    @pytest.mark.parametrize("window", [509, 512])
    @pytest.mark.parametrize("windows", [4, 15, 60])
    def test_windows_of_any_length_cover_the_truth(self, windows, window):
        # Positions of a window are alike, as those of a text are.
        generator = np.random.default_rng(9)
        covered = 0
        for _ in range(200):
            sample = np.repeat(generator.normal(size=windows), window) + generator.normal(
                size=windows * window
            )
            interval = paired_bootstrap(sample, np.zeros_like(sample), window=window, resamples=400)
            covered += interval.low <= 0 <= interval.high
        # Binomial(200, 0.95) is at least 178 with probability above 0.999.
        assert covered >= 178

    def test_parts_of_windows_weigh_what_they_hold(self):
        # Three windows of 7 are cut into six parts of three or four positions.
        sample = np.arange(21.0) ** 2
        interval = paired_bootstrap(sample, np.zeros(21), window=7)
        assert interval.mean == pytest.approx(sample.mean())
        constant = paired_bootstrap(np.full(21, 0.3), np.zeros(21), window=7)
        np.testing.assert_allclose(constant, 0.3)

    def test_blocks_are_resampled_together(self):
        # Positions of a window are alike: one interval is that of the windows, the other is too narrow.
        generator = np.random.default_rng(7)
        windows = generator.normal(size=100)
        first = np.repeat(windows, 50) + 0.1 * generator.normal(size=5000)
        _, low, high = paired_bootstrap(first, np.zeros(5000), window=50)
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
        # Student's t of 4 degrees of freedom.
        half = 2.776 * runs.std(ddof=1) / 5**0.5
        assert high - low == pytest.approx(2 * half, rel=0.1)
        # Two samples vary by themselves, whatever the order of their runs.
        apart = paired_bootstrap(first, first)
        assert apart.high - apart.low > 1.2 * (high - low)
        one, other = paired_bootstrap(first[:1], shared), paired_bootstrap(first[0], shared)
        assert one == other

    @pytest.mark.parametrize("runs", [(5, 1), (5, 5), (2, 1)])
    def test_few_runs_cover_the_truth(self, runs):
        generator = np.random.default_rng(10)
        shared = generator.normal(size=100)
        covered = 0
        for _ in range(400):
            first, second = (shared + generator.normal(size=(count, 1)) * (count > 1) for count in runs)
            interval = paired_bootstrap(first, second, resamples=400)
            covered += interval.low <= 0 <= interval.high
        # Binomial(400, 0.95) is at least 366 with probability above 0.998.
        assert covered >= 366

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
        with pytest.raises(InputError, match="window must divide the positions: got 2 for 3 of them"):
            paired_bootstrap([1, 2, 3], [1, 2, 3], window=2)
        with pytest.raises(InputError, match="one position says nothing of others"):
            paired_bootstrap([1], [2])
        with pytest.raises(InputError, match="must be finite: got NaN or Inf in 2 of 6"):
            paired_bootstrap([1, np.nan, 3], [1, 2, -np.inf])
        with pytest.raises(InputError, match="confidence"):
            paired_bootstrap([1, 2], [1, 2], confidence=1.0)
