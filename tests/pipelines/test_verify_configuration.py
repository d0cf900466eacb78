"""What both readers of configurations say about thousands of layers."""

from __future__ import annotations

import time

import pytest

from qkern.checkpoints import FORMATS
from qkern.pipelines.verification.configuration import Configuration
from qkern.schemes import Scheme

NAMES = [f"model.layers.{index // 384}.mlp.experts.{index % 384}.up_proj" for index in range(20_000)]
SKIPPED = [f"{name}_other" for name in NAMES]


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_thousands_of_named_layers(format):
    kinds = [Scheme.parse("w4g32z"), Scheme.parse("w4g32z" if format == "awq" else "w8g64z")]
    schemes = {name: kinds[number % 2] for number, name in enumerate(NAMES)}
    started = time.monotonic()
    config = FORMATS[format].config(schemes, skipped=SKIPPED)
    entry_of, said = FORMATS[format].entry_of(config), Configuration(config, format)
    for name, scheme in schemes.items():
        assert entry_of(name).scheme == scheme
        layout = said.layout_of(name, {})
        assert (layout.bits, layout.group_size, layout.symmetric) == (scheme.bits, scheme.group_size, False)
        assert not said.is_excluded(name)
    assert all(said.is_excluded(name) for name in SKIPPED)
    assert time.monotonic() - started < 20  # looking at each pair takes minutes to hours
