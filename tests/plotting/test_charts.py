"""Pictures appear whole, and Markdown stays a table."""

import pytest

from qkern.plotting import has_matplotlib, markdown, plot_bars, plot_points
from qkern.plotting.style import new_axes, save

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _needs_matplotlib(request):
    if "markdown" not in request.node.name:
        pytest.importorskip("matplotlib")


def test_points_and_bars(tmp_path):
    points = {"a": [("w4", 4.1, 0.02), ("w2", 2.1, 0.9)], "b": [("q4", 4.5, 0.01)]}
    assert plot_points(points, tmp_path / "points.png", x="bits", y="KL", is_log=True).name == "points.png"
    # A series that a group lacks, and more series than colours.
    bars = {"1": {f"m{number}": number + 1.0 for number in range(11)}, "512": {"m3": 2.0}}
    plot_bars(bars, tmp_path / "bars.png", x="prompt", y="tokens/s")
    plot_points(points, tmp_path / "points.svg", x="bits", y="KL")
    assert [(tmp_path / name).read_bytes()[:8] for name in ("points.png", "bars.png")] == [PNG, PNG]
    svg = (tmp_path / "points.svg").read_text()
    assert "</svg>" in svg
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.png", "points.png", "points.svg"]


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    figure, _ = new_axes()
    with pytest.raises(ValueError, match="nonsense"):
        save(figure, tmp_path / "picture.nonsense")
    assert not list(tmp_path.iterdir())


def test_has_matplotlib():
    assert has_matplotlib()


def test_markdown_cells_cannot_break_the_table():
    table = (("model", "text"), [("a|b", "line\nnext")])
    assert markdown(table).splitlines() == ["| model | text |", "| --- | --- |", "| a\\|b | line next |"]
