"""A layer that leaves out what it computed before gives the bits of one that runs whole."""

import pytest
import torch

from qkern.calibration import LayerStream, Replay, Weights, meta_copy, streaming
from qkern.models import column_weight, describe, known_architectures, set_column_weight
from qkern.nn import named_linears, unfuse_experts

IDS = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))


def stream_of(model):
    structure = describe(model)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    weights = Weights(tensors, {name: name for name in tensors}, "the model")
    stream = LayerStream(meta_copy(model), structure.layers, weights, head=structure.head)
    stream.embed(IDS)
    return stream


@pytest.fixture(autouse=True)
def uneven_chunks(monkeypatch):
    # Two sequences at a time and a last chunk of one.
    monkeypatch.setattr(streaming, "CHUNK_TOKENS", 48)


@pytest.fixture
def calls(monkeypatch):
    """Every linear that is called from then on, in turn."""
    found = []
    forward = torch.nn.Linear.forward

    def counted(self, x):
        found.append(self)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return found


def quantized_in_turn(stream, index, stages, replay):
    """Inputs of every stage, each linear halved after it was seen, and the states after the layer."""
    seen = {}
    with stream.layer(index) as layer:
        known = replay(layer)
        for stage in stages:
            watch = {group[0]: seen.setdefault(group[0], []).append for group in stage}
            stream.run(index, watch=watch, replay=known)
            for name in (name for group in stage for name in group):
                module = layer.get_submodule(name)
                set_column_weight(module, column_weight(module) / 2)
        stream.advance(index, known)
    return seen, stream.states


@pytest.mark.parametrize("limit", [0, 20000, 1 << 28])
@pytest.mark.parametrize("model_type", [*known_architectures(), "gpt_neox"])
def test_bits_are_those_of_whole_runs(tiny, model_type, limit):
    model = tiny(model_type)
    unfuse_experts(model)
    whole, short = stream_of(model), stream_of(model)
    for index in range(len(whole.layers)):
        with whole.layer(index) as layer:
            stages = whole.discover(index, list(named_linears(layer)))
        expected, states = quantized_in_turn(whole, index, stages, lambda _: None)
        found, others = quantized_in_turn(short, index, stages, lambda layer: Replay(layer, limit))
        assert found.keys() == expected.keys()
        for name, inputs in expected.items():
            assert len(found[name]) == len(inputs)
            assert all(map(torch.equal, found[name], inputs))
        assert all(map(torch.equal, others, states))


def test_attention_and_mlp_run_once(tiny, calls):
    stream = stream_of(tiny("llama"))
    with stream.layer(0) as layer:
        replay = Replay(layer)
        attention, mlp = layer.self_attn, layer.mlp
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            stream.run(0, watch={name: lambda x: None}, replay=replay)
        stream.advance(0, replay)
        # Three chunks; the first goes on to the end in every run, which shows what ends a module.
        assert calls.count(attention.q_proj) == 3 + 1
        assert calls.count(mlp.gate_proj) == 3 + 3
        assert calls.count(attention.o_proj) == 1 + 1 + 3 + 3 + 3
        calls.clear()
        stream.advance(0)
    assert calls.count(attention.q_proj) == calls.count(mlp.gate_proj) == 3


def test_a_linear_before_the_last_is_still_shown(tiny):
    stream = stream_of(tiny("llama"))
    seen = []
    with stream.layer(0) as layer:
        replay = Replay(layer)
        stream.run(0, watch={"self_attn.o_proj": lambda x: None}, replay=replay)
        stream.run(0, watch={"self_attn.q_proj": seen.append}, replay=replay)
    assert len(seen) == 3


class Ending(torch.nn.Module):
    """An MLP that does more, or not, than to give what its last linear makes of its input."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up, self.down = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        x = self.up(x)
        if self.kind == "twice":
            self.down(x * 2)
            return self.down(x)
        result = self.down(x)
        if self.kind == "more":
            return result + 1
        if self.kind == "written":
            x += 1
        return result


@pytest.mark.parametrize("kind", ["plain", "twice", "more", "written"])
def test_what_is_more_than_its_last_linear_runs_again(tiny, calls, kind):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = Ending(kind)
    whole, short = stream_of(model), stream_of(model)
    states, shown = [], []
    for stream in (whole, short):
        with stream.layer(0) as layer:
            replay = None if stream is whole else Replay(layer)
            inputs = []
            stream.run(0, watch={"mlp.down": lambda x, to=inputs: to.append(x.clone())}, replay=replay)
            shown.append(inputs)
            calls.clear()
            stream.advance(0, replay)
            ran = calls.count(layer.mlp.up)
        states.append(stream.states)
    assert all(map(torch.equal, *states))
    assert [len(inputs) for inputs in shown] == [3, 3]
    assert all(map(torch.equal, *shown))
    # Of the first chunk alone a pass came as far as to write.
    assert ran == {"plain": 0, "written": 1}.get(kind, 3)


class Chain(torch.nn.Module):
    """Blocks one after another, whose linears are named as those of experts are."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Ending("plain") for _ in range(2))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def test_blocks_one_after_another_run_again(tiny):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = Chain()
    whole, short = stream_of(model), stream_of(model)
    with whole.layer(0) as layer:
        stages = whole.discover(0, list(named_linears(layer)))
    assert (("mlp.blocks.0.down",), ("mlp.blocks.1.down",)) in stages
    expected, states = quantized_in_turn(whole, 0, stages, lambda _: None)
    found, others = quantized_in_turn(short, 0, stages, Replay)
    for name, inputs in expected.items():
        assert all(map(torch.equal, found[name], inputs))
    assert all(map(torch.equal, others, states))
