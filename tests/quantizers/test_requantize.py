from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from qkern.errors import InputError, UnsupportedError
from qkern.ops import dequantize_groupwise, quantize_groupwise
from qkern.ops.quantize_groupwise.nested import decode, nest
from qkern.quantizers import HessianAccumulator, quantize_gptq, quantize_rtn, requantize
from qkern.quantizers.gptq import GPTQConfig

if TYPE_CHECKING:
    from qkern.schemes import QuantizedWeight

SPELLINGS = ("w2g32", "w3g32", "w4", "w4t", "w4g32z", "w8z", "w8a8", "nf4g32", "fp4g32", "w4g48z", "w4g32a8")
DOUBLE = ("nf4g32d", "w4g32zd")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_offsets(quantized: QuantizedWeight) -> QuantizedWeight:
    assert quantized.zeros is not None
    offsets = -quantized.zeros.float() * quantized.scales.float()
    return replace(quantized, zeros=None, offsets=offsets.to(quantized.scales.dtype))


def act_order(spelling: str, *, uneven: bool = False) -> QuantizedWeight:
    hessian = HessianAccumulator(96)
    hessian.add(random(200, 96, seed=1) * torch.linspace(0.1, 3, 96).roll(40))
    weight = quantize_gptq(
        random(10, 96), hessian.value, spelling, GPTQConfig(act_order="desc_act", scale_dtype=torch.bfloat16)
    ).weight
    assert weight.group_index is not None
    if uneven:
        index = weight.group_index.clone()
        index[index == 1] = 2
        weight = replace(weight, group_index=index)
    return weight


CASES = {
    **{spelling: quantize_rtn(random(10, 96), spelling) for spelling in SPELLINGS + DOUBLE},
    "offsets": with_offsets(quantize_rtn(random(10, 96), "w4g32z")),
    "offsets of 0": with_offsets(quantize_rtn(random(10, 96).abs(), "w4g32z")),
    "act-order": act_order("w4g32"),
    "act-order, zeros": act_order("w3g32z"),
    "act-order, offsets": with_offsets(act_order("w4g32z")),
    "act-order, uneven": act_order("w4g32", uneven=True),
    "fp32 scales": quantize_rtn(random(10, 90), "w4g32", search="mse", scale_dtype=torch.float32),
    "input scale": replace(quantize_rtn(random(4, 32), "w8a8"), input_scale=torch.tensor([0.5])),
}


@pytest.fixture(params=CASES)
def before(request: pytest.FixtureRequest) -> QuantizedWeight:
    return CASES[request.param]


def error(weight: torch.Tensor, quantized: QuantizedWeight) -> float:
    return float((dequantize_groupwise(quantized) - weight).square().sum())


def test_a_weight_that_did_not_change_keeps_its_values_and_grid(before: QuantizedWeight) -> None:
    values = dequantize_groupwise(before)
    after = requantize(values, before)
    assert torch.equal(dequantize_groupwise(after), values)
    for name in ("scales", "zeros", "offsets", "group_index", "input_scale", "nested"):
        one, other = getattr(after, name), getattr(before, name)
        assert one is other or torch.equal(one, other), name


def test_a_change_is_followed_as_well_as_on_any_of_the_grids(before: QuantizedWeight) -> None:
    N, K = before.shape
    changed = dequantize_groupwise(before) * 1.7 + random(N, K, seed=2) * 0.3
    after = requantize(changed, before)
    assert after.scheme == before.scheme
    assert after.scales.dtype == before.scales.dtype
    assert error(changed, after) < 0.5 * error(changed, before)
    # Of scales that are quantized again the better grid need not stay the better one.
    if before.group_index is None and before.offsets is None and before.nested is None:
        fresh = quantize_groupwise(changed, before.scheme, search="mse", scale_dtype=before.scales.dtype)
        assert error(changed, after) <= error(changed, fresh) * (1 + 1e-6)


def test_groups_far_from_a_change_stay_bit_for_bit() -> None:
    before = CASES["w4g32z"]
    changed = dequantize_groupwise(before)
    changed[3, 40] += 5.0
    after = requantize(changed, before)
    differs = (after.scales != before.scales) | (after.zeros != before.zeros)  # type: ignore[operator]
    assert differs.nonzero().tolist() == [[3, 1]]


def test_double_quantized_scales_are_nested_as_they_were() -> None:
    before = quantize_rtn(random(40, 32 * 17), "nf4g32d", search="absmax")  # 680 scales: 256 + 256 + 168
    old = before.nested
    assert old is not None
    weight = dequantize_groupwise(before)
    weight[20] *= 1.5  # scales 340 to 356, of the second block
    after = requantize(weight, before)
    new = after.nested
    assert new is not None
    assert torch.equal(after.scales, decode(new, tuple(after.scales.shape)))
    assert (new.offset, new.block) == (old.offset, old.block)
    others = torch.arange(680) // 256 != 1
    assert torch.equal(new.codes[others], old.codes[others])
    assert torch.equal(new.absmax[::2], old.absmax[::2])
    # Of the second block what bitsandbytes makes of scales on the grids that fit best.
    plain = replace(before, scheme=replace(before.scheme, double_quant=False), nested=None)
    fresh = nest(requantize(weight, plain).scales, old.offset)
    assert torch.equal(new.codes[~others], fresh.codes[~others])
    assert torch.equal(new.absmax[1], fresh.absmax[1])
    nearest = quantize_groupwise(weight, plain.scheme, scales=after.scales)
    assert torch.equal(after.codes, nearest.codes)
    assert error(weight, after) < 0.5 * error(weight, before)


def test_nested_scales_of_other_blocks_and_tables() -> None:
    before = quantize_rtn(random(40, 96), "nf4g32d")
    old = nest(before.scales, 0.01, block=64)
    table = old.table.clone()
    table[3] += 1e-4
    for nested in (old, replace(old, table=table)):
        weight = replace(before, nested=nested, scales=decode(nested, (40, 3)))
        changed = dequantize_groupwise(weight) * 1.3
        after = requantize(changed, weight)
        assert after.nested is not None
        assert (after.nested.block, after.nested.absmax.numel()) == (64, 2)
        assert after.nested.offset != 0.01  # every block is new, so the mean may be too
        assert torch.equal(after.nested.table, old.table)
        assert torch.equal(after.scales, decode(after.nested, (40, 3)))
        assert error(changed, after) < 0.1 * error(changed, weight)


def test_what_it_cannot_do_is_refused() -> None:
    before = CASES["w4g32z"]
    with pytest.raises(InputError, match=r"\(10, 96\) as before: got torch.float32 \(10, 95\)"):
        requantize(random(10, 95), before)
    with pytest.raises(InputError, match="NaN"):
        requantize(torch.full((10, 96), torch.nan), before)
    with pytest.raises(UnsupportedError, match="one matrix"):
        requantize(random(2, 10, 96), quantize_rtn(random(2, 10, 96), "w4g32"))


@pytest.mark.parametrize("spelling", ["w4g32", "w4g32z", "w8t"])
@pytest.mark.parametrize("shape", [(8, 0), (0, 64)])
def test_a_weight_without_values_comes_back(spelling: str, shape: tuple[int, int]) -> None:
    weight = torch.empty(shape)
    found = requantize(weight, quantize_rtn(weight, spelling))
    assert found.shape == shape
    assert torch.equal(dequantize_groupwise(found), weight)
