"""What both readers of configurations say: the same, of thousands of layers too."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkern.checkpoints import FORMATS
from qkern.errors import FormatError
from qkern.pipelines.verification.configuration import configuration_of
from qkern.schemes import Scheme

NAMES = [f"model.layers.{index // 384}.mlp.experts.{index % 384}.up_proj" for index in range(20_000)]
SKIPPED = [f"{name}_other" for name in NAMES]


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_thousands_of_named_layers(format):
    kinds = [Scheme.parse("w4g32z"), Scheme.parse("w4g32z" if format == "awq" else "w8g64z")]
    schemes = {name: kinds[number % 2] for number, name in enumerate(NAMES)}
    started = time.monotonic()
    config = FORMATS[format].config(schemes, skipped=SKIPPED)
    entry_of, said = FORMATS[format].entry_of(config), configuration_of(config, format)
    for name, scheme in schemes.items():
        assert entry_of(name).scheme == scheme
        layout = said.layout_of(name, {})
        assert (layout.bits, layout.group_size, layout.symmetric) == (scheme.bits, scheme.group_size, False)
        assert not said.is_excluded(name)
    assert all(said.is_excluded(name) for name in SKIPPED)
    assert time.monotonic() - started < 20  # looking at each pair takes minutes to hours


PART = st.text("ab.0-_", max_size=4)
PATTERN = st.one_of(
    PART,
    PART.map(lambda part: f"^{re.escape(part)}$"),
    PART.map(lambda part: f"{re.escape(part)}$"),
    PART.map(lambda part: f".*{part}"),
    st.sampled_from([r"a\$", r"^(a|b)", "[ab]", "^^a$", r"a\\$", r"^\w$", r"\.0", "^a-$"]),
)


@given(st.lists(st.tuples(st.sampled_from("+-"), PATTERN), unique_by=lambda entry: entry[1]), PART)
def test_the_first_pattern_counts(patterns, name):
    config = {"bits": 4, "dynamic": {f"{sign}:{pattern}": {} for sign, pattern in patterns}}
    expected = next((sign == "-" for sign, pattern in patterns if re.match(pattern, name)), None)
    assert configuration_of(config, "gptq").is_excluded(name) is expected


@given(st.lists(PART), PART)
def test_awq_skips_by_parts_of_names(parts, name):
    said = configuration_of({"bits": 4, "modules_to_not_convert": parts}, "awq")
    assert said.is_excluded(name) == any(part in name for part in parts)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_linear_is_the_class_and_lm_head_a_name(order):
    schemes = [Scheme.parse(spelling) for spelling in ("w8", "w2g16z", "w4g32")]
    format = FORMATS["compressed-tensors"]
    groups = list(format.config(dict(zip("abc", schemes, strict=True)))["config_groups"].values())
    for group, target in zip(groups, ("lm_head", "Embedding", "Linear"), strict=True):
        group["targets"] = [target]
    config = {"config_groups": {str(place): groups[place] for place in order}}
    entry_of, said = format.entry_of(config), configuration_of(config, format.name)
    for name, scheme in (("lm_head", schemes[0]), (NAMES[0], schemes[2])):
        assert entry_of(name).scheme == scheme
        assert said.layout_of(name, {}).bits == scheme.bits
    config = {"config_groups": {"head": groups[0]}}
    with pytest.raises(FormatError, match="no group of quantization_config targets"):
        format.entry_of(config)(NAMES[0])
    with pytest.raises(FormatError, match="no config group targets"):
        configuration_of(config, format.name).layout_of(NAMES[0], {})
