"""Heat maps are files of the kind that their names end in; what could not be written is refused before."""

import pytest

from qkern.errors import InputError, UnsupportedError
from qkern.plotting import check_picture, heat, plot_heat

MAPS = {
    "w2": {"0": {"q": 1e-3, "k": 2e-2}, "1": {"q": 3e-4}},
    "w4": {"0": {"q": 0.0, "k": 1e-5}, "1": {"q": 2e-6, "k": 1e-6}},
}


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_written(tmp_path, kind, start):
    path = plot_heat(MAPS, tmp_path / f"a.{kind}", label="KL", rows="layer")
    assert path.read_bytes().startswith(start)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match="exists"):
        check_picture(path)


def test_values_decide_the_picture(tmp_path):
    one = plot_heat(MAPS, tmp_path / "a.png", label="KL", rows="layer").read_bytes()
    other = plot_heat({**MAPS, "w4": MAPS["w2"]}, tmp_path / "b.png", label="KL", rows="layer").read_bytes()
    assert one != other
    # Nothing but zeros is no reason to fail.
    plot_heat({"16": {"0": {"q": 0.0}}}, tmp_path / "c.png", label="KL", rows="layer")


def test_all_maps_have_the_rows_of_all(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(heat, "save", lambda figure, path: drawn.append(figure) or path)
    maps = {"q4_0": {"-1": {"q": 1e-3}, "0": {}}, "q4_k": {"0": {"k": 2e-3}, "1": {"k": 3e-3}}}
    plot_heat(maps, tmp_path / "a.png", label="KL", rows="layer")
    first, second, _ = drawn[0].axes
    rows = [label.get_text() for label in first.get_yticklabels()]
    assert rows == ["-1", "0", "1"]
    for axes, map_ in zip((first, second), maps.values(), strict=True):
        (image,) = axes.images
        expected = [[map_.get(row, {}).get(column, 0.0) for column in "qk"] for row in rows]
        assert image.get_array().filled(0).tolist() == expected
        assert axes.get_ylim() == (2.5, -0.5)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"a\.txt is no picture: its name ends in \.png, \.svg, \.pdf"):
        check_picture(tmp_path / "a.txt")
    with pytest.raises(InputError, match="does not exist"):
        check_picture(tmp_path / "none" / "a.png")
    check_picture(tmp_path / "a.png")
    monkeypatch.setattr(heat, "has_matplotlib", lambda: False)
    with pytest.raises(UnsupportedError, match=r"pip install matplotlib"):
        check_picture(tmp_path / "a.png")
