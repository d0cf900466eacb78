"""Losses that are known are not asked for again, by this run or the next."""

import json

import pytest

from qkern.errors import InputError
from qkern.search import ORIGINAL, CachedLosses, Gene, Space, sensitivities, single_changes

SPACE = Space(
    tuple(
        Gene(names=(f"l{i}",), layer=i, weights=64, alleles=("w2", "w4", "16"), bits=(128, 256, 1024))
        for i in range(3)
    )
)


class Chunks:
    """Loss of a chunk: its number plus the digits of the genome."""

    chunks = (10, 10, 5)

    def __init__(self):
        self.asked = []

    def kl(self, genomes, chunks=slice(None)):
        start, stop, _ = chunks.indices(len(self.chunks))
        self.asked += [(genome, start, stop) for genome in genomes]
        return [self.value(genome, start, stop) for genome in genomes]

    def value(self, genome, start, stop):
        parts = [(chunk + sum(genome)) * self.chunks[chunk] for chunk in range(start, stop)]
        return sum(parts) / sum(self.chunks[start:stop])


def test_nothing_is_evaluated_twice():
    source = Chunks()
    losses = CachedLosses(source, SPACE)
    genomes = [(0, 1, 2), (2, 1, 0), (0, 1, 2), (1, 1, 1)]
    assert losses(genomes, 1) == [3, 3, 3, 3]
    assert source.asked == [((0, 1, 2), 0, 1), ((2, 1, 0), 0, 1), ((1, 1, 1), 0, 1)]
    source.asked.clear()
    other = (0, 0, 0)
    found = losses([(0, 1, 2), other])
    assert found == pytest.approx([source.value(g, 0, 3) for g in ((0, 1, 2), other)])
    # What one chunk is known of goes through the others alone.
    assert sorted(source.asked) == [((0, 0, 0), 0, 3), ((0, 1, 2), 1, 3)]
    source.asked.clear()
    assert losses([other, (0, 1, 2)], 3) == found[::-1]
    assert losses([(1, 1, 1)], 2) == pytest.approx([source.value((1, 1, 1), 0, 2)])
    assert source.asked == [((1, 1, 1), 1, 2)]
    assert losses.evaluated == 4


def test_the_next_run_knows_them(tmp_path):
    file = tmp_path / "losses.jsonl"
    first = CachedLosses(Chunks(), SPACE, file)
    genomes = [(0, 1, 2), (ORIGINAL, 0, ORIGINAL)]
    found = [*first(genomes, 1), *first(genomes)]
    # A run that was killed while it wrote a line.
    with file.open("a") as opened:
        opened.write('["w2 w2 w2", 0, 3, 7.')
    source = Chunks()
    losses = CachedLosses(source, SPACE, file)
    assert [*losses(genomes, 1), *losses(genomes)] == found
    assert source.asked == []
    assert losses.evaluated == 2
    assert losses([(0, 0, 0)]) == [source.value((0, 0, 0), 0, 3)]
    assert len(source.asked) == 1
    lines = file.read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == ["w2 w4 16", "- w2 -"] * 2 + ["w2 w2 w2"]
    file.write_text("\n".join([*lines, "[1]", ""]))
    with pytest.raises(InputError, match=r"losses\.jsonl is damaged: '\[1\]' is no evaluation"):
        CachedLosses(Chunks(), SPACE, file)


@pytest.mark.parametrize(
    "line",
    [
        '["w2 w2 w2", 0, 0, 1.0]',
        '["w2 w2 w2", 0, 4, 1.0]',
        '["w2 w2 w2", -1, 2, 1.0]',
        '["w2 w2 w2", 0, 0.5, 1.0]',
        '["w2 w2 w2", 0, Infinity, 1.0]',
        '["w2 w2 w2", 0, 3, NaN]',
        '["w2 w2 w2", 0, 3, -Infinity]',
        '["w2 w2 w2", 0, 3, "1"]',
        f'["w2 w2 w2", 0, 3, 1{"0" * 400}]',
        "[" * 100_000,
        "\udcff\udcfe",
    ],
)
def test_what_is_no_evaluation_is_an_error(tmp_path, line):
    file = tmp_path / "losses.jsonl"
    file.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(InputError, match=r"losses\.jsonl is damaged: .* remove the file"):
        CachedLosses(Chunks(), SPACE, file)


def test_a_loss_that_is_not_finite_is_an_error():
    source = Chunks()
    source.value = lambda *_: float("nan")
    with pytest.raises(InputError, match=r"not finite \(w2 w4 16\): activations overflow"):
        CachedLosses(source, SPACE)([(0, 1, 2)])


def test_sensitivities_change_one_gene_of_the_original():
    asked = []

    def evaluate(genomes):
        asked.extend(genomes)
        return [100 * i + sum(g for g in genome if g != ORIGINAL) for i, genome in enumerate(genomes)]

    table = sensitivities(SPACE, evaluate)
    assert asked == list(single_changes(SPACE).values())
    assert asked[:2] == [(0, ORIGINAL, ORIGINAL), (1, ORIGINAL, ORIGINAL)]
    assert len(asked) == 6
    assert table == [[0, 101, 0], [200, 301, 0], [400, 501, 0]]  # 16-bit is the original


def test_the_best_are_of_what_this_run_asked_for_whole(tmp_path):
    file = tmp_path / "losses.jsonl"
    CachedLosses(Chunks(), SPACE, file)([(0, 0, 0), (1, 0, 0)])
    losses = CachedLosses(Chunks(), SPACE, file)
    losses([(0, 0, 0), (2, 1, 0), (1, 1, 0), (1, 0, 0)], 1)
    losses([(2, 1, 0), (1, 1, 0)])
    losses([(2, 1, 0)], 2)
    assert losses.best(5) == [(1, 1, 0), (2, 1, 0)]
    assert losses.best(1) == [(1, 1, 0)]
