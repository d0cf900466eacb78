"""Assignments: what is read, what is refused, and which tensor gets what."""

import json

import pytest

from qkern.errors import InputError, UnsupportedError
from qkern.ops.gguf_types import gguf_type
from qkern.schemes import Scheme
from qkern.search import MixedPrecision, parse_choice

NAMES = [
    f"model.layers.{layer}.{linear}" for layer in range(3) for linear in ("self_attn.q_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("spelling", "choice"),
    [
        ("16", None),
        ("w2g64", Scheme.parse("w2g64")),
        ("w8a8", Scheme.parse("w8a8")),
        ("Q4_K", gguf_type("q4_k")),
    ],
)
def test_choices(spelling, choice):
    assert parse_choice(spelling) == choice


@pytest.mark.parametrize("spelling", ["w5", "", "iq1_s", "q4_k_m", "17", None])
def test_choices_that_do_not_exist(spelling):
    with pytest.raises(InputError, match="schemes look like"):
        parse_choice(spelling)


def test_names_of_many_experts_are_looked_up(monkeypatch):
    names = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(5000)]
    found = MixedPrecision({**dict.fromkeys(names[1:], "w4g32"), "experts.0.up_proj": "w8"})
    # Each with each would be 25 million.
    monkeypatch.setattr(
        "qkern.search.assignment.name_matches", lambda *_: pytest.fail("every pair is looked at")
    )
    choices = found.resolve(names)
    assert list(choices) == names
    assert str(choices[names[0]]) == "w8"
    assert {str(choice) for choice in choices.values()} == {"w8", "w4g32"}


def test_names_ends_and_globs_are_resolved():
    mixed = MixedPrecision({"*.layers.0.*": "w8", "layers.1.mlp.down_proj": "w2g64", NAMES[5]: "16"})
    found = mixed.resolve(NAMES)
    assert {name: str(choice) for name, choice in found.items()} == {
        NAMES[0]: "w8",
        NAMES[1]: "w8",
        NAMES[3]: "w2g64",
        NAMES[5]: "None",
    }
    assert list(mixed.schemes(NAMES)) == [NAMES[0], NAMES[1], NAMES[3]]


def test_a_pattern_without_a_tensor():
    with pytest.raises(
        InputError,
        match=r"'up_proj' names no tensor that could be quantized here; there are model\.layers\.0",
    ):
        MixedPrecision({"up_proj": "w4"}).resolve(NAMES)


def test_kinds_are_looked_at_before_names():
    with pytest.raises(
        UnsupportedError, match=r"gives model\.embed_tokens the GGUF type q4_k, .* export-gguf"
    ):
        MixedPrecision({"model.embed_tokens": "q4_k"}).schemes(NAMES)
    with pytest.raises(UnsupportedError, match="gives nothing the scheme w4, which GGUF does not hold"):
        MixedPrecision({"nothing": "w4"}).gguf_types(NAMES)


def test_a_file_of_endless_brackets(tmp_path):
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="cannot read the assignment"):
        MixedPrecision.read(tmp_path / "a.json")


def test_a_tensor_that_is_named_twice():
    mixed = MixedPrecision({"*.mlp.*": "w4", "*.layers.2.*": "w8"})
    with pytest.raises(
        InputError, match=r"names model\.layers\.2\.mlp\.down_proj twice: by '\*\.mlp\.\*' and by"
    ):
        mixed.resolve(NAMES)


def test_schemes_and_types_do_not_mix():
    with pytest.raises(InputError, match=r"not both: got 'a': 'w4' and 'b': 'q4_k'"):
        MixedPrecision({"a": "w4", "b": "q4_k"})


def test_each_path_takes_its_own_kind():
    with pytest.raises(UnsupportedError, match="use it with export-gguf"):
        MixedPrecision({"q_proj": "q4_k"}).schemes(NAMES)
    with pytest.raises(UnsupportedError, match="use it with quantize"):
        MixedPrecision({"q_proj": "w4"}).gguf_types(NAMES)
    assert MixedPrecision({"q_proj": "q4_k"}).gguf_types(NAMES)[NAMES[0]].name == "q4_k"


def test_written_and_read_again(tmp_path):
    mixed = MixedPrecision({"down_proj": "w2g64", "q_proj": "16"})
    path = mixed.write(tmp_path / "assignment.json")
    assert json.loads(path.read_text()) == {"down_proj": "w2g64", "q_proj": "16"}
    assert (
        MixedPrecision.of(str(path))
        == mixed
        == MixedPrecision.of({"down_proj": Scheme.parse("w2g64"), "q_proj": None})
    )
    assert [file.name for file in tmp_path.iterdir()] == ["assignment.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot read"),
        ("[1]", r"is no assignment but \[1\]"),
        ("null", "is no assignment but null"),
        ('{"a": 4}', "strings such as '16' or 'w4g128': got 4 for 'a'"),
        ('{"a": null}', "got null for 'a'"),
        ('{"a": "w4", "a": "w8"}', "'a' is there twice"),
        ("{}", "is empty"),
        ('{"a": "w9"}', "'a': not a scheme"),
    ],
)
def test_files_that_are_no_assignments(tmp_path, text, reason):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        MixedPrecision.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("given", [5, None, [("a", "w4")]])
def test_what_is_no_mapping(given):
    for make in (MixedPrecision, MixedPrecision.of):
        with pytest.raises(InputError, match="is a mapping of names and choices, or a JSON file of one: got"):
            make(given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"a": 4}, "got 4 for .a."), ({"a": {(1, 2): 3}}, "for .a."), ({1: "w4"}, "got .w4. for 1")],
)
def test_mappings_that_are_no_assignments(given, reason):
    for make in (MixedPrecision, MixedPrecision.of):
        with pytest.raises(InputError, match=f"names and choices, strings .*{reason}"):
            make(given)


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": "w4"}', encoding="utf-8-sig")
    assert MixedPrecision.read(path).choices == {"a": "w4"}
