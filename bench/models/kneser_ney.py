"""Interpolated modified Kneser-Ney n-grams over token ids: the baseline of the test models.

P(w | h) = max(c(hw) - D(c(hw)), 0) / c(h.) + gamma(h) P(w | h without its first token), down to
the uniform distribution. The highest order counts occurrences, the lower ones count the distinct
tokens seen on the left. The three discounts of an order come from its counts of counts
(Chen and Goodman, 1998).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Order:
    grams: Ints  # sorted keys of the n-grams
    discounted: Floats  # their counts after the discount
    contexts: Ints  # sorted keys of the n-grams without their last token
    totals: Floats
    kept: Floats  # mass that a context gives to the lower order


def _discounts(counts: Ints) -> Floats:
    """Return the discount of a count of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(raw, 0.0, [0.0, 1.0, 2.0, 3.0])


def _keys(tokens: Ints, order: int, vocab: int) -> Ints:
    """One integer for each n-gram of the stream, the first token in the highest place."""
    key = np.zeros(max(len(tokens) - order + 1, 0), dtype=np.int64)
    for place in range(order):
        key = key * vocab + tokens[place : place + len(key)]
    return key


def _find(keys: Ints, values: Floats, wanted: Ints) -> Floats:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: Floats = np.where(keys[place] == wanted, values[place], 0.0)
    return found


class KneserNey:
    """An n-gram model; `order` 3 is a trigram. Needs vocab ** order < 2 ** 63."""

    def __init__(self, tokens: Ints, vocab: int, order: int = 3) -> None:
        self.vocab = vocab
        self.order = order
        self._orders: list[_Order] = []
        grams, counts = np.unique(_keys(tokens, order, vocab), return_counts=True)
        for n in range(order, 0, -1):
            self._orders.insert(0, self._estimate(grams, counts))
            # Continuation counts: how many distinct tokens stand before each shorter n-gram.
            grams, counts = np.unique(grams % vocab ** (n - 1), return_counts=True)

    def _estimate(self, grams: Ints, counts: Ints) -> _Order:
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        contexts, group = np.unique(grams // self.vocab, return_inverse=True)
        totals = np.bincount(group, weights=counts)
        kept = np.bincount(group, weights=discounts) / totals
        return _Order(grams, counts - discounts, contexts, totals.astype(np.float64), kept)

    def probabilities(self, contexts: Ints, targets: Ints) -> Floats:
        """P(targets | contexts): `contexts` is [n, order - 1], oldest token first."""
        p = np.full(len(targets), 1.0 / self.vocab)
        context = np.zeros(len(targets), dtype=np.int64)
        for n, level in enumerate(self._orders, start=1):
            if n > 1:
                column = contexts[:, self.order - n]
                context = context + column * self.vocab ** (n - 2)
            total = _find(level.contexts, level.totals, context)
            kept = _find(level.contexts, level.kept, context)
            count = _find(level.grams, level.discounted, context * self.vocab + targets)
            seen = total > 0
            p = np.where(seen, count / np.where(seen, total, 1.0) + kept * p, p)
        return p

    def check(self, tokens: Ints, samples: int = 8) -> None:
        """Raise unless the probabilities sum to 1 for contexts of `tokens` and unseen ones."""
        rng = np.random.default_rng(0)
        places = rng.integers(0, len(tokens) - self.order, samples)
        seen = np.stack([tokens[p : p + self.order - 1] for p in places])
        unseen = rng.integers(0, self.vocab, seen.shape)
        every = np.arange(self.vocab)
        for context in np.concatenate([seen, unseen]):
            total = self.probabilities(np.tile(context, (self.vocab, 1)), every).sum()
            if abs(total - 1.0) > 1e-9:
                raise AssertionError(f"probabilities after {context.tolist()} sum to {total}")

    def perplexity(self, tokens: Ints, positions: Ints) -> float:
        """Perplexity of the tokens at `positions`, each after the true tokens before it."""
        back = np.arange(self.order - 1, 0, -1)
        contexts = tokens[np.maximum(positions[:, None] - back, 0)]
        return float(np.exp(-np.log(self.probabilities(contexts, tokens[positions])).mean()))
