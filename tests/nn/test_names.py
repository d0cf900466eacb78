"""Look-ups of names: what a walk over all patterns finds, without one."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import FormatError
from qkern.nn import FirstMatch, FirstPart

NAME = st.text("ab.0-_", max_size=4)
PATTERN = st.one_of(
    NAME.map(lambda name: f"^{re.escape(name)}$"),
    NAME.map(lambda name: f"{re.escape(name)}$"),
    NAME,
    NAME.map(lambda name: f".*{name}"),
    st.sampled_from([r"a\$", r"^(a|b)", "[ab]", "^^a$", r"a\\$", r"^\w$", r"\.0", "^a-$"]),
)


@given(st.lists(PATTERN, max_size=8), NAME)
def test_first_match_is_that_of_a_walk(patterns, name):
    expected = next((number for number, each in enumerate(patterns) if re.match(each, name)), None)
    assert FirstMatch((each, number) for number, each in enumerate(patterns))(name) == expected


@given(st.lists(NAME, max_size=8), NAME)
def test_first_part_is_one_that_the_name_contains(parts, name):
    found = FirstPart(parts)(name)
    contained = {part for part in parts if part in name}
    assert found in contained if contained else found is None


def test_patterns_that_are_none():
    with pytest.raises(FormatError, match=r"'\(' is no regular expression"):
        FirstMatch([("a", 1), ("(", 2)])


def test_thousands_of_names():
    names = [f"model.layers.{index}.mlp.experts.{index % 128}.up_proj" for index in range(20_000)]
    patterns = [(r"^model\.layers\.0\.", -1), *((f"^{re.escape(name)}$", i) for i, name in enumerate(names))]
    started = time.monotonic()
    first, part = FirstMatch(patterns), FirstPart(f"{name}_other" for name in names)
    assert [first(name) for name in names] == [-1, *range(1, 20_000)]
    assert not any(map(part, names))
    assert time.monotonic() - started < 20  # a walk for each name takes hours
