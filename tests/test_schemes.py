"""The spelling of a scheme, strict, with a hint where only the writing differs; what fits a weight."""

from dataclasses import replace

import pytest
import torch

from qkern.errors import InputError
from qkern.ops import quantize_groupwise
from qkern.schemes import Scheme, as_scheme


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [("W4G128", "w4g128"), ("w4_g128", "w4g128"), (" w8a8\n", "w8a8"), ("NF4-g64-d", "nf4g64d")],
)
def test_another_writing_is_refused_with_the_right_one(spelling, meant):
    with pytest.raises(InputError, match=rf"not a scheme: .*; did you mean '{meant}'\?$"):
        Scheme.parse(spelling)
    assert str(Scheme.parse(meant)) == meant


@pytest.mark.parametrize("given", [None, 4, b"w4"])
def test_another_type_is_refused_by_name(given):
    with pytest.raises(InputError, match=rf"not a scheme: got {type(given).__name__} .*allowed are a Scheme"):
        as_scheme(given)


@pytest.mark.parametrize("spelling", ["int4", "", "W4G", "128w4", "w4g-1", "w-4g128"])
def test_no_hint_without_a_scheme_that_is_close(spelling):
    with pytest.raises(InputError, match=r"not a scheme: .* for example w4g128 or w4g128z$"):
        Scheme.parse(spelling)


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("codes", torch.zeros(19, dtype=torch.uint8), r"codes of nested scales must be torch.uint8 \(20,\)"),
        ("codes", torch.zeros(20), r"codes of nested scales must be .* got torch.float32"),
        ("table", torch.zeros(16), r"table of nested scales must be torch.float32 \(256,\)"),
        ("absmax", torch.zeros(2), r"absmax of nested scales must be torch.float32 \(1,\)"),
        ("block", 0, "in blocks of 1 or more"),
    ],
)
def test_nested_scales_fit_their_weight(part, value, problem):
    weight = quantize_groupwise(torch.randn(10, 64), "nf4g32d")
    with pytest.raises(InputError, match=problem):
        replace(weight, nested=replace(weight.nested, **{part: value}))
    plain = quantize_groupwise(torch.randn(10, 64), "nf4g32")
    with pytest.raises(InputError, match=r"nested scales go with double quantization \(d\): got nf4g32"):
        replace(plain, nested=weight.nested)
