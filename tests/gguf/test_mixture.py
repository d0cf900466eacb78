"""Mixtures against llama.cpp's rules; test_llama_cpp.py asks llama.cpp itself."""

import pytest

from qkern.errors import UnsupportedError
from qkern.gguf.mixture import MIXTURES, choose_type, mixture_for


def name_of(mixture, tensor, shape=(512, 512), **options):
    settings = {"layers": 32, "tied": False, **options}
    return choose_type(mixture_for(mixture), tensor, shape, **settings).name


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
        (28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]),
    ],
)
@pytest.mark.parametrize("tensor", ["attn_v", "ffn_down"])
def test_layers_with_more_bits(layers, more, tensor):
    chosen = [name_of("q4_k_m", f"blk.{layer}.{tensor}.weight", layers=layers) for layer in range(layers)]
    assert [layer for layer, name in enumerate(chosen) if name == "q6_k"] == more
    assert set(chosen) == {"q4_k", "q6_k"}


def test_other_matrices_and_vectors():
    for tensor in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert name_of("q4_k_m", f"blk.0.{tensor}.weight") == "q4_k"
    assert name_of("q4_k_m", "token_embd.weight") == "q4_k"
    assert name_of("q4_k_m", "output.weight") == "q6_k"
    for mixture in MIXTURES:
        assert name_of(mixture, "blk.0.attn_norm.weight", (512,)) == "f32"
        assert name_of(mixture, "blk.0.attn_q_norm.weight", (8, 64)) == "f32"
        assert name_of(mixture, "blk.0.attn_q.bias", (512,)) == "f32"


@pytest.mark.parametrize(
    ("mixture", "output"),
    [("q4_0", "q6_k"), ("q5_1", "q6_k"), ("q6_k", "q6_k"), ("q8_0", "q8_0"), ("f16", "f16"), ("f32", "f32")],
)
def test_the_output_matrix(mixture, output):
    assert name_of(mixture, "output.weight") == output
    assert name_of(mixture, "token_embd.weight", tied=True) == output
    assert name_of(mixture, "output.weight", pure=True) == MIXTURES[mixture].base


@pytest.mark.parametrize(
    ("mixture", "K", "expected"),
    [
        ("q4_k_m", 896, "q5_0"),
        ("q6_k", 896, "q8_0"),
        ("q4_k_m", 48, "f16"),
        ("q4_0", 48, "f16"),
        ("q8_0", 96, "q8_0"),
        ("bf16", 5, "bf16"),
    ],
)
def test_rows_that_blocks_do_not_divide(mixture, K, expected):
    assert name_of(mixture, "blk.9.attn_q.weight", (64, K)) == expected


def test_70b_models_give_values_more_bits():
    assert name_of("q4_k_m", "blk.20.attn_v.weight", layers=80, is_70b=True) == "q5_k"
    assert name_of("q4_k_m", "blk.0.attn_v.weight", layers=80, is_70b=True) == "q6_k"
    assert name_of("q4_k_m", "blk.20.attn_v.weight", layers=80, is_70b=True, pure=True) == "q4_k"
    assert name_of("q4_k_m", "blk.20.ffn_down.weight", layers=80, is_70b=True) == "q4_k"


def test_names():
    assert mixture_for("Q4_K") is MIXTURES["q4_k_m"]
    with pytest.raises(UnsupportedError, match=r"got 'iq2_xs', allowed are f32, .*q4_k_m.*q4_k \(= q4_k_m\)"):
        mixture_for("iq2_xs")
