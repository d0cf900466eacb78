"""QuantEmbedding: look-up by row, and the same table as an output head."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qkern import InputError, QuantEmbedding, UnsupportedError
from qkern.nn import TiedHead
from qkern.ops import dequantize_groupwise, quantize_groupwise

V, H = 40, 48


def make_embedding(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Embedding(V, H, dtype=dtype)


def table_of(embedding, dtype=torch.float32):
    return dequantize_groupwise(embedding.quantized(), dtype)


@pytest.mark.parametrize("scheme", ["w2g16", "w3g16z", "w4g16", "w4g32z", "w8", "w8t"])
def test_look_up_is_a_row_of_the_dequantized_table(scheme):
    embedding = QuantEmbedding.from_embedding(make_embedding(), scheme)
    table = table_of(embedding)
    for ids in (
        torch.tensor(3),
        torch.tensor([[0, V - 1, 7], [7, 7, 1]]),
        torch.zeros(0, 2, dtype=torch.int64),
    ):
        found = embedding(ids)
        assert found.shape == (*ids.shape, H)
        assert torch.equal(found, table[ids])
    assert torch.equal(embedding(torch.arange(5, dtype=torch.int32)), table[:5])


def test_look_up_decodes_no_nested_scales(monkeypatch):
    embedding = QuantEmbedding.from_embedding(make_embedding(), "nf4g16d")
    table = table_of(embedding)
    decoded = []
    monkeypatch.setattr("qkern.nn.state.nested_from_bytes", decoded.append)
    ids = torch.tensor([[0, V - 1], [7, 7]])
    assert torch.equal(embedding(ids), table[ids])
    assert not decoded


def test_act_order_table():
    index = torch.arange(H, dtype=torch.int32) % 3
    plain = quantize_groupwise(make_embedding().weight.detach(), "w4g16")
    weight = type(plain)(
        codes=plain.codes, scales=plain.scales, shape=plain.shape, scheme=plain.scheme, group_index=index
    )
    embedding = QuantEmbedding.from_quantized(weight)
    assert torch.equal(embedding(torch.tensor([4, 9])), dequantize_groupwise(weight, torch.float32)[[4, 9]])


def test_output_dtype_follows_casts_and_the_table_does_not():
    embedding = QuantEmbedding.from_embedding(make_embedding(torch.bfloat16), "w4g16")
    ids = torch.tensor([1, 2])
    assert embedding(ids).dtype == torch.bfloat16
    before = {name: t.clone() for name, t in embedding.state_dict().items()}
    embedding.half()
    assert embedding(ids).dtype == torch.float16
    assert embedding.state_dict().keys() == before.keys() == {"codes", "scales"}
    assert all(
        torch.equal(t, before[name]) and t.dtype == before[name].dtype
        for name, t in embedding.state_dict().items()
    )


def test_as_linear_is_the_table_as_a_head():
    embedding = QuantEmbedding.from_embedding(make_embedding(), "w4g16")
    hidden = torch.randn(2, 3, H)
    embedding.compute = "float"
    torch.testing.assert_close(
        embedding.as_linear(hidden), hidden @ table_of(embedding).T, rtol=1e-5, atol=1e-5
    )
    embedding.compute = "int8"
    coarse = embedding.as_linear(hidden)
    assert not torch.equal(coarse, hidden @ table_of(embedding).T)
    torch.testing.assert_close(coarse, hidden @ table_of(embedding).T, rtol=0.1, atol=0.2)


class Tied(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.head = TiedHead(embedding)

    def forward(self, ids):
        return self.head(self.embedding(ids))


class TestTiedHead:
    def make(self):
        model = Tied(QuantEmbedding.from_embedding(make_embedding(), "w4g16"))
        model.embedding.compute = "float"
        return model

    def test_table_is_saved_once(self):
        assert self.make().state_dict().keys() == {"embedding.codes", "embedding.scales"}

    def test_copies_stay_tied(self):
        model = self.make()
        ids = torch.tensor([[1, 5]])
        logits = model(ids)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.head.embedding is other.embedding
            assert other.embedding is not model.embedding
            assert torch.equal(other(ids), logits)

    def test_head_sees_new_weights(self):
        model = self.make()
        ids = torch.tensor([[1, 5]])
        before = model(ids)
        state = model.state_dict()
        state["embedding.scales"] = state["embedding.scales"] * 2
        model.load_state_dict(state)
        torch.testing.assert_close(model(ids), before * 4, rtol=1e-4, atol=1e-4)

    def test_gradient_reaches_the_hidden_state(self):
        model = self.make()
        hidden = torch.randn(2, H, requires_grad=True)
        model.head(hidden).sum().backward()
        torch.testing.assert_close(
            hidden.grad, table_of(model.embedding).sum(0).expand(2, H), rtol=1e-4, atol=1e-4
        )

    def test_compile_full_graph(self):
        torch._dynamo.reset()
        model = self.make()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ids = torch.tensor([[1, 5, 2]])
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), model(ids))
            state = model.state_dict()
            state["embedding.scales"] = state["embedding.scales"] * 2
            model.load_state_dict(state)
            torch.testing.assert_close(compiled(ids), model(ids))


def test_meta_gives_shapes_only():
    embedding = QuantEmbedding.from_embedding(make_embedding(), "w4g16").to("meta")
    assert embedding(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, H)


def test_errors():
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(UnsupportedError, match=r"plain nn\.Embedding"):
        QuantEmbedding.from_embedding(Scaled(V, H), "w4")
    with pytest.raises(UnsupportedError, match="max_norm"):
        QuantEmbedding.from_embedding(nn.Embedding(V, H, max_norm=1.0), "w4")
    embedding = QuantEmbedding.from_embedding(make_embedding(), "w4g16")
    with pytest.raises(InputError, match=r"wrong dtype: got torch\.float32 \[2\], .*; convert"):
        embedding(torch.zeros(2))


@pytest.mark.parametrize("scheme", ["w4g16z", "w8t"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("ids", "got"), [([[3, V]], f"3 to {V}"), ([-1, 2], "-1 to 2"), (-7, "-7 to -7")])
def test_ids_out_of_range(scheme, dtype, ids, got):
    embedding = QuantEmbedding.from_embedding(make_embedding(), scheme)
    with pytest.raises(InputError, match=rf"ids are out of range: got {got}, allowed are 0 to {V - 1},"):
        embedding(torch.tensor(ids, dtype=dtype))
