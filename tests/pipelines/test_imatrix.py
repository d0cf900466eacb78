"""The importance matrix of a model, against hooks on the whole model."""

import logging

import pytest
import torch
from torch import nn

import qkern
from qkern.errors import InputError, UnsupportedError
from qkern.gguf import read_imatrix

IDS = torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(0))


def squares(x):
    return x.double().reshape(-1, x.shape[-1]).square().sum(0)


def hooked(model, ids):
    """Sums of squares by the name of the linear."""
    sums = {}

    def see(name, x):
        sums[name] = sums.get(name, 0) + squares(x)

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return sums


def close(entry, expected, tokens):
    assert entry.counts.tolist() == [tokens]
    assert torch.allclose(entry.sums[0].double(), expected, rtol=1e-4, atol=1e-6)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_sums_equal_those_of_the_whole_model(model_type, tiny, monkeypatch):
    monkeypatch.setattr("qkern.calibration.streaming.CHUNK_TOKENS", 32)  # chunks of 2, 2 and 1 sequences
    model = tiny(model_type)
    expected = hooked(model, IDS)
    matrix = qkern.imatrix(model, calibration=IDS)
    assert len(matrix.entries) == 14
    for layer in range(2):
        for module, name in NAMES.items():
            entry = matrix.entries[f"blk.{layer}.{name}.weight"]
            close(entry, expected[f"model.layers.{layer}.{module}"], IDS.numel())
    assert (matrix.chunk_count, matrix.chunk_size) == (5, 16)
    assert matrix.datasets == ("token ids",)


def test_the_head_is_collected_on_request(tiny):
    model = tiny("llama")
    expected = hooked(model, IDS)["lm_head"]
    matrix = qkern.imatrix(model, calibration=IDS, process_output=True)
    assert set(matrix.entries) - set(qkern.imatrix(model, calibration=IDS).entries) == {"output.weight"}
    close(matrix.entries["output.weight"], expected, IDS.numel())
    with pytest.raises(InputError, match=r"is its embedding: GGUF has no output\.weight"):
        qkern.imatrix(tiny("qwen2"), calibration=IDS, process_output=True)


@pytest.fixture
def mixtral(tiny):
    return tiny("mixtral")


def test_experts_are_summed_each_by_itself(mixtral):
    seen = {}

    def see(experts, args):
        hidden, chosen, _ = args
        into = seen.setdefault(experts, [torch.zeros(4, 64), torch.zeros(4, 96), torch.zeros(4)])
        for expert in range(4):
            x = hidden[(chosen == expert).any(-1)]
            gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            into[0][expert] += x.square().sum(0)
            into[1][expert] += (nn.functional.silu(gate) * up).square().sum(0)
            into[2][expert] += len(x)

    for layer in mixtral.model.layers:
        layer.mlp.experts.register_forward_pre_hook(see)
    with torch.no_grad():
        mixtral(IDS)
    matrix = qkern.imatrix(mixtral, calibration=IDS)
    assert len(matrix.entries) == 2 * (4 + 1 + 3)
    for index, layer in enumerate(mixtral.model.layers):
        inputs, inner, counts = seen[layer.mlp.experts]
        for name, sums in (("gate", inputs), ("up", inputs), ("down", inner)):
            entry = matrix.entries[f"blk.{index}.ffn_{name}_exps.weight"]
            assert torch.allclose(entry.sums, sums, rtol=1e-4, atol=1e-6)
            assert entry.counts.tolist() == counts.tolist()
        router = matrix.entries[f"blk.{index}.ffn_gate_inp.weight"]
        assert router.counts.tolist() == [IDS.numel()]
        assert torch.allclose(router.sums[0] * 2, inputs.sum(0), rtol=1e-4)  # each token goes to two experts


def test_an_expert_that_no_token_reaches_has_a_count_of_zero(mixtral):
    matrix = qkern.imatrix(mixtral, calibration=IDS[:1, :2])
    entry = matrix.entries["blk.0.ffn_up_exps.weight"]
    assert int((entry.counts == 0).sum()) >= 1
    assert bool((entry.mean[entry.counts == 0] == 0).all())
    assert bool((entry.mean[entry.counts > 0] > 0).any())


DENSE = set(NAMES.values())
ATTENTION = {name for name in DENSE if name.startswith("attn")}
EXPERTS = {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
SHARED = {"ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
OTHERS = {
    "gemma2": DENSE,
    "phi3": {"attn_qkv", "attn_output", "ffn_up", "ffn_down"},
    "mixtral": ATTENTION | EXPERTS,
    "qwen2_moe": ATTENTION | EXPERTS | SHARED,
    "qwen3_moe": ATTENTION | EXPERTS,
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_names_are_those_of_llama_cpp(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "pad_token_id": 0}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
    )
    matrix = qkern.imatrix(AutoModelForCausalLM.from_config(config), calibration=IDS)
    assert set(matrix.entries) == {f"blk.0.{name}.weight" for name in OTHERS[model_type]}


def test_a_product_that_is_not_followed_is_refused(mixtral, monkeypatch):
    for layer in mixtral.model.layers:
        weight = layer.mlp.gate.weight
        monkeypatch.setattr(
            type(layer.mlp.gate),
            "forward",
            lambda self, x: (None, torch.ones(x.shape[0], 2) / 2, (x @ self.weight.T).topk(2)[1]),
        )
        assert weight.dim() == 2
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.gate\.weight is multiplied in a way that"):
        qkern.imatrix(mixtral, calibration=IDS)


def test_what_cannot_be(tiny, tmp_path):
    with pytest.raises(UnsupportedError, match="'gpt_neox' is not exported to GGUF"):
        qkern.imatrix(tiny("gpt_neox"), calibration=IDS)
    with pytest.raises(InputError, match=r"written as \.gguf, or as \.dat"):
        qkern.imatrix(tiny("llama"), calibration=IDS, output=tmp_path / "imatrix")
    with pytest.raises(InputError, match="calibration is missing"):
        qkern.imatrix(tiny("llama"), calibration=None)
    with pytest.raises(InputError, match="vocabulary"):
        qkern.imatrix(tiny("llama"), calibration=IDS + 96)
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight is given activations that are"):
        qkern.imatrix(model, calibration=IDS, output=tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_command_line(suffix, tmp_path, capsys, caplog):
    from qkern import cli
    from qkern.demo import CALIBRATION, MODEL

    output = tmp_path / f"m.{suffix}"
    options = ["--calibration", CALIBRATION, "--output", output, "--samples", 2, "--length", 32]
    caplog.set_level(logging.WARNING)
    with pytest.raises(SystemExit) as stop:
        cli.main(["imatrix", str(MODEL), *map(str, options)])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"28 tensors over 2 sequences of 32 tokens: {output}\n"
    read = read_imatrix(output)
    expected = qkern.imatrix(MODEL, calibration=CALIBRATION, samples=2, length=32)
    assert set(read.entries) == set(expected.entries)
    for name, entry in read.entries.items():
        assert torch.equal(entry.mean, expected.entries[name].mean)
    assert read.datasets == expected.datasets == (CALIBRATION.name,)
    assert read.chunk_count == 2
    assert caplog.records == []
