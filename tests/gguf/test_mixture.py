"""Mixtures against llama.cpp's rules; test_mixture_llama_cpp.py asks llama.cpp itself."""

import logging

import pytest

from qkern.errors import InputError, UnsupportedError
from qkern.gguf.mixture import MIXTURES, ModelFacts, choose_types, mixture_for
from qkern.gguf.overrides import parse_overrides


def names_of(mixture, shapes, *, overrides=None, pure=False, **facts):
    model = ModelFacts(**{"architecture": "llama", "layers": 32, "heads": 4, "value_heads": 4, **facts})
    types = choose_types(
        mixture_for(mixture), shapes, model, overrides=parse_overrides(overrides or {}), pure=pure
    )
    return {name: kind.name for name, kind in types.items()}


def layers_of(tensor, layers, shape=(512, 512)):
    return {"output.weight": shape} | {f"blk.{layer}.{tensor}.weight": shape for layer in range(layers)}


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
        (28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]),
    ],
)
@pytest.mark.parametrize("tensor", ["attn_v", "ffn_down"])
def test_layers_with_more_bits(layers, more, tensor):
    chosen = names_of("q4_k_m", layers_of(tensor, layers), layers=layers)
    del chosen["output.weight"]
    assert [layer for layer, name in enumerate(chosen.values()) if name == "q6_k"] == more
    assert set(chosen.values()) == {"q4_k", "q6_k"}


@pytest.mark.parametrize("mixture", [name for name in MIXTURES if name != "q2_k_s"])
def test_vectors_norms_routers_and_positions_stay_f32(mixture):
    kept = {
        "blk.0.attn_norm.weight": (512,),
        "blk.0.attn_q_norm.weight": (8, 64),
        "blk.0.attn_q.bias": (512,),
        "blk.0.ffn_gate_inp.weight": (8, 512),
        "blk.0.ffn_gate_inp_shexp.weight": (1, 512),
        "position_embd.weight": (16, 512),
        "token_types.weight": (2, 512),
    }
    assert set(names_of(mixture, kept).values()) == {"f32"}


@pytest.mark.parametrize(
    ("mixture", "output"),
    [("q4_0", "q6_k"), ("q5_1", "q6_k"), ("q6_k", "q6_k"), ("q8_0", "q8_0"), ("f16", "f16"), ("f32", "f32")],
)
def test_the_output_matrix(mixture, output):
    matrices = {"token_embd.weight": (512, 512), "output.weight": (512, 512)}
    tied = {"token_embd.weight": (512, 512)}
    base = MIXTURES[mixture].base
    assert names_of(mixture, matrices) == {"token_embd.weight": base, "output.weight": output}
    assert names_of(mixture, tied) == {"token_embd.weight": output}
    assert names_of(mixture, matrices, pure=True) == dict.fromkeys(matrices, base)
    assert names_of(mixture, matrices, pure={"output.weight"}) == dict.fromkeys(matrices, base)
    assert names_of(mixture, matrices, pure={"token_embd.weight"})["output.weight"] == output


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
def test_rows_that_blocks_do_not_divide(mixture, K, expected, caplog):
    with caplog.at_level(logging.WARNING, logger="qkern"):
        types = names_of(mixture, layers_of("attn_q", 9, (64, K)))
    assert types["blk.8.attn_q.weight"] == expected
    base = MIXTURES[mixture].base
    said = f" tensors are {expected} in place of {base}, whose blocks" in caplog.text
    assert said == (expected != base)


def test_facts_from_a_configuration():
    config = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    assert ModelFacts.from_config("llama", config) == ModelFacts(
        architecture="llama", layers=80, heads=64, value_heads=8
    )
    assert ModelFacts.from_config("llama", config).is_70b
    mixtral = ModelFacts.from_config("llama", {**config, "num_local_experts": 8}, importance=True)
    assert (mixtral.experts, mixtral.importance, mixtral.is_70b) == (8, True, False)
    assert ModelFacts.from_config("qwen3moe", {**config, "num_experts": 128}).experts == 128
    encoder = ModelFacts.from_config("bert", {"num_hidden_layers": 12, "num_attention_heads": 12})
    assert (encoder.value_heads, encoder.experts) == (12, 0)


def test_names():
    assert mixture_for("Q4_K") is MIXTURES["q4_k_m"]
    assert mixture_for("q3_k") is MIXTURES["q3_k_m"]
    assert mixture_for("q5_K_S") is MIXTURES["q5_k_s"]
    with pytest.raises(UnsupportedError, match=r"got 'iq2_xs', allowed are f32, .*q4_k_m.*q4_k \(= q4_k_m\)"):
        mixture_for("iq2_xs")


MATRICES = {
    "token_embd.weight": (512, 512),
    "blk.0.attn_norm.weight": (512,),
    "blk.0.ffn_down.weight": (512, 288),
    "blk.0.ffn_up.weight": (288, 512),
}


def test_the_first_override_wins_and_holds_in_a_pure_file_too():
    overrides = {r"\.ffn_up": "Q8_0", "ffn": "q5_0"}
    for pure in (False, True):
        types = names_of("q4_0", MATRICES, overrides=overrides, pure=pure)
        assert types["blk.0.ffn_up.weight"] == "q8_0"
        assert types["blk.0.ffn_down.weight"] == "q5_0"
        assert types["blk.0.attn_norm.weight"] == "f32"
        assert types["token_embd.weight"] == ("q4_0" if pure else "q6_k")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"attn_v": "q6_k"},
            r"attn_v=q6_k: the pattern is in no tensor's name; there are token_embd.weight, blk",
        ),
        ({"ffn_d[": "q6_k"}, r"ffn_d\[=q6_k: 'ffn_d\[' is no regular expression \(unterminated"),
        ({"ffn_up": "q9_k"}, "unknown GGUF tensor type: got 'q9_k', allowed are f32"),
        ({"norm": "q8_0"}, "norm=q8_0: .* stay f32, .*blk.0.attn_norm.weight; leave it out"),
        ({"ffn": "q4_k"}, "ffn=q4_k: rows of blk.0.ffn_down.weight have 288 weights, .*blocks of 256"),
        ({"ffn": "q8_0", "ffn_up": "q6_k"}, "ffn_up=q6_k: earlier patterns decide .* blk.0.ffn_up.weight"),
    ],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(InputError, match=message):
        names_of("q8_0", MATRICES, overrides=overrides)
