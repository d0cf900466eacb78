from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from qkern.errors import InputError
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode
from qkern.quantizers import (
    HessianAccumulator,
    grouped_query_share,
    output_error,
    producer_scales,
    quantize_gptq,
    quantize_rtn,
    search_clip,
    search_gguf_scales,
    search_scales,
)
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

T, K = 512, 96


def inputs(seed: int = 0, tokens: int = T, features: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * 0.1 + torch.eye(features)
    return torch.randn(tokens, features, generator=generator) @ mix


def weight(rows: int = 40, features: int = K, seed: int = 1) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) * 0.05


def rounded(w: Tensor, scheme: str) -> Tensor:
    return dequantize_groupwise(quantize_rtn(w, scheme))


def lost(w: Tensor, q: Tensor, x: Tensor) -> float:
    return float(((x @ (w - q).T) ** 2).sum())


def loud_form(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The same function with some channels 30 times louder and their columns 30 times smaller."""
    loud = torch.ones(K)
    loud[[5, 50, 77]] = 30
    return x * loud, w / loud


@pytest.mark.parametrize("spelling", ["w4g32z", "w4g40", "w3", "w2g32z", "w4t"])
def test_scales_undo_loud_channels(spelling: str) -> None:
    x, w = inputs(), weight()
    plain = lost(w, rounded(w, spelling), x)
    loud_x, loud_w = loud_form(x, w)
    # Without scales the loud channels' small weights fall between the points of the grid.
    assert lost(loud_w, rounded(loud_w, spelling), loud_x) > 1.1 * plain
    scales = search_scales([loud_w], loud_x, spelling)
    assert lost(loud_w, rounded(loud_w * scales, spelling) / scales, loud_x) < 1.05 * plain
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("spelling", ["w4g32", "w3g48z", "w2"])
def test_scales_never_lose_to_none(spelling: str) -> None:
    for seed in range(4):
        x, w = inputs(seed), weight(seed=seed)
        scales = search_scales([w], x, spelling)
        assert scales.dtype == torch.float32
        scaled = lost(w, rounded(w * scales, spelling) / scales, x)
        assert scaled <= lost(w, rounded(w, spelling), x) * (1 + 1e-4)


def test_linears_that_share_an_input_are_judged_together() -> None:
    x, (loud_x, loud) = inputs(), loud_form(inputs(), weight())
    small = weight(8, seed=7) * 0.01
    together = search_scales([loud, small, loud + 0.01], loud_x, "w4g32z")
    accumulated = HessianAccumulator(K)
    for batch in loud_x.split(100):
        accumulated.add(batch)
    stacked = search_scales([torch.cat([loud, small, loud + 0.01])], accumulated, "w4g32z")
    torch.testing.assert_close(together, stacked, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(together, search_scales([small], x, "w4g32z"), rtol=1e-2)


def test_the_block_that_reads_the_input_is_the_judge() -> None:
    x = inputs()
    gate, up = weight(seed=3), weight(seed=4)
    loud_x, loud_gate = loud_form(x, gate)
    loud_up = loud_form(x, up)[1]
    seen: list[int] = []

    def block(weights: Sequence[Tensor]) -> Tensor:
        seen.append(len(weights))
        return torch.nn.functional.silu(loud_x @ weights[0].T) * (loud_x @ weights[1].T)

    scales = search_scales([loud_gate, loud_up], loud_x, "w3g32", ratios=10, run=block)
    assert seen == [2] * 12  # the target, no scaling, ten ratios

    def block_error(by: Tensor) -> float:
        quantized = [rounded(w * by, "w3g32") / by for w in (loud_gate, loud_up)]
        return float((block(quantized) - block([loud_gate, loud_up])).square().mean())

    assert block_error(scales) < 0.7 * block_error(torch.ones(K))
    # A block that is blind to the weights gives no reason to scale.
    assert torch.equal(search_scales([loud_gate], loud_x, "w3g32", run=lambda _: x), torch.ones(K))


def test_dead_channels_are_not_blown_up() -> None:
    x = inputs()
    x[:, 7] = 0
    scales = search_scales([weight()], x, "w3g32")
    assert bool(torch.isfinite(scales).all())
    assert float(scales.max() / scales.min()) <= 1.1e4


def test_share_is_the_head_that_attention_repeats() -> None:
    heads, kv_heads, head_dim = 6, 2, 4
    share = grouped_query_share(heads, kv_heads, head_dim)
    values = torch.arange(kv_heads * head_dim).view(1, kv_heads, 1, head_dim)
    # What transformers' repeat_kv does to [batch, kv_heads, tokens, head_dim].
    repeated = values.repeat_interleave(heads // kv_heads, dim=1)
    assert torch.equal(share, repeated.flatten())
    with pytest.raises(InputError, match="kv_heads must divide heads"):
        grouped_query_share(6, 4, 8)


def test_grouped_query_pair_keeps_the_function_and_lowers_the_error() -> None:
    heads, kv_heads, head_dim = 12, 3, 8
    share = grouped_query_share(heads, kv_heads, head_dim)
    x = inputs(features=48)
    value, output = weight(kv_heads * head_dim, 48), weight(20, K, seed=2)
    value[3] *= 40  # one loud value channel, read by four heads
    output[:, share == 3] /= 40
    mixed = (x @ value.T)[:, share]
    scales = search_scales([output], mixed, "w4g32z", share=share)
    producer = producer_scales(scales, share)
    assert producer.shape == (kv_heads * head_dim,)
    assert torch.equal(producer[share], scales)
    folded = (x @ (value / producer[:, None]).T)[:, share]
    torch.testing.assert_close(folded @ (output * scales).T, mixed @ output.T, rtol=1e-3, atol=1e-4)
    after = lost(output * scales, rounded(output * scales, "w4g32z"), folded)
    assert after < 0.5 * lost(output, rounded(output, "w4g32z"), mixed)


@pytest.mark.parametrize("heads", [3, 5])
def test_shared_scales_are_equal_to_the_last_bit(heads: int) -> None:
    # Vectors of a processor and what is left over after them may round a power differently.
    share = grouped_query_share(heads, 1, 16)
    for seed in range(8):
        columns = share.numel()
        mixed = inputs(features=columns, seed=seed)
        scales = search_scales([weight(20, columns, seed=seed)], mixed, "w4g16z", share=share)
        assert torch.equal(scales, scales[:16].repeat(heads)), seed


@pytest.mark.parametrize("spelling", ["w2g32", "w3g32z", "w4g40", "w3", "w3g32", "w2t", "w2tz"])
def test_clipping_lowers_the_output_error(spelling: str) -> None:
    x, w = inputs(), weight() ** 3 * 400  # heavy tails
    clipped = search_clip(w, x, spelling)
    before, after = lost(w, rounded(w, spelling), x), lost(w, rounded(clipped, spelling), x)
    assert after < 0.9 * before
    scheme = Scheme.parse(spelling)
    if scheme.zero_point:
        assert bool(((clipped.abs() <= w.abs()) & (clipped * w >= 0)).all())
    else:
        assert bool((clipped.abs() <= w.abs()).all())


def test_clipping_takes_the_best_range_of_each_group() -> None:
    x, w = inputs(), weight(6) ** 3 * 400
    length, steps, shrink = 32, 5, 0.5
    clipped = search_clip(w, x, "w2g32", shrink=shrink, steps=steps)
    for row in range(6):
        for start in range(0, K, length):
            part, group = slice(start, start + length), w[row : row + 1, start : start + length]
            top = group.abs().max()
            trials = [group.clamp(-r * top, r * top) for r in (1 - shrink * i / steps for i in range(steps))]
            errors = [lost(group, rounded(trial, "w2g32"), x[:, part]) for trial in trials]
            found = lost(group, rounded(clipped[row : row + 1, part], "w2g32"), x[:, part])
            assert found == pytest.approx(min(errors), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    assert search_clip(weight().to(dtype), inputs().to(dtype), "w3g32").dtype == dtype
    assert search_scales([weight().to(dtype)], inputs().to(dtype), "w3g32").dtype == torch.float32


def test_scales_combine_with_gptq() -> None:
    accumulated = HessianAccumulator(K)
    x, w = loud_form(inputs(), weight())
    accumulated.add(x)
    scales = search_scales([w], accumulated, "w3g32")
    folded = accumulated.scaled(scales)
    awq = output_error(w * scales, quantize_rtn(w * scales, "w3g32"), folded.value)
    both = quantize_gptq(w * scales, folded.value, "w3g32").error
    assert both < 0.6 * awq


def test_wrong_arguments_are_refused() -> None:
    x, w = inputs(), weight()
    with pytest.raises(InputError, match="empty list"):
        search_scales([], x, "w4")
    with pytest.raises(InputError, match="same input"):
        search_scales([w, weight(4, 12)], x, "w4")
    with pytest.raises(InputError, match=r"floating \[\.\.\., 96\]"):
        search_scales([w], x[:, :5], "w4")
    with pytest.raises(InputError, match="0 tokens of 96"):
        search_clip(w, HessianAccumulator(K), "w4")
    with pytest.raises(InputError, match="NaN or Inf"):
        search_clip(w, x.index_fill(1, torch.tensor(3), torch.nan), "w4")
    with pytest.raises(InputError, match="ratios"):
        search_scales([w], x, "w4", ratios=0)
    with pytest.raises(InputError, match="share"):
        search_scales([w], x, "w4", share=torch.arange(5))
    with pytest.raises(InputError, match="shrink"):
        search_clip(w, x, "w4", shrink=1.0)


def in_blocks(w: Tensor, kind: str, x: Tensor) -> Tensor:
    """What GGUF blocks keep of a weight, its error weighed by the input."""
    return gguf_decode(gguf_encode(w, kind, importance=x.square().mean(0)), kind)


# A block with a minimum serves a few loud columns better than one without, so there is less to undo.
@pytest.mark.parametrize(
    ("kinds", "left"), [(("q4_0",), 0.5), (("q5_1", "q4_0"), 0.5), (("q4_1", "f16"), 0.9)]
)
def test_gguf_scales_undo_loud_channels(kinds: Sequence[str], left: float) -> None:
    x = inputs()
    loud_x, _ = loud_form(x, weight())
    weights = [loud_form(x, weight(seed=seed))[1] for seed in range(len(kinds))]
    scales = search_gguf_scales(weights, loud_x, kinds)
    scaled_x = loud_x / scales
    before = after = 0.0
    for w, kind in zip(weights, kinds, strict=True):
        before += lost(w, in_blocks(w, kind, loud_x), loud_x)
        after += lost(w * scales, in_blocks(w * scales, kind, scaled_x), scaled_x)
    assert after < left * before


@pytest.mark.parametrize("kind", ["iq4_nl", "iq4_xs", "q4_0"])
def test_gguf_scales_see_columns_that_widen_their_group(kind: str) -> None:
    # All inputs are equally loud, so that only the weights' own sizes can say which columns to scale.
    w = weight(features=256)
    w[:, ::32] *= 20
    scales = search_gguf_scales([w], torch.eye(256), [kind])
    assert scales[::32].max() < 0.5 * scales[1::32].min()


def test_gguf_scales_of_shared_channels_are_equal() -> None:
    share = torch.arange(K) % 48
    scales = search_gguf_scales([weight()], inputs(), ["q4_0"], share=share)
    assert torch.equal(scales[:48], scales[48:])


def test_gguf_scales_need_a_type_for_each_weight() -> None:
    with pytest.raises(InputError, match="one type for each of 2 weights: got 1"):
        search_gguf_scales([weight(), weight()], inputs(), ["q4_0"])
    with pytest.raises(InputError, match="unknown GGUF tensor type"):
        search_gguf_scales([weight()], inputs(), ["w4"])
    with pytest.raises(InputError, match="ratios must be at least 1"):
        search_gguf_scales([weight()], inputs(), ["q4_0"], ratios=0)
