"""Layer by layer gives what the model gives at once, for every architecture and one nobody described."""

import pytest
import torch

from qkern.calibration import (
    LayerStream,
    Weights,
    bind_names,
    filled,
    meta_copy,
    meta_model,
    products,
    stages_by_role,
    streaming,
)
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.models import describe, known_architectures
from qkern.nn import named_linears, unfuse_experts

ALL = (*known_architectures(), "gpt_neox")
IDS = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))


def weights_of(model):
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return Weights(tensors, {name: name for name in tensors}, "the model")


def stream_of(model, **kwargs):
    structure = describe(model)
    return LayerStream(meta_copy(model), structure.layers, weights_of(model), head=structure.head, **kwargs)


@pytest.fixture(autouse=True)
def uneven_chunks(monkeypatch):
    # Two sequences at a time and a last chunk of one.
    monkeypatch.setattr(streaming, "CHUNK_TOKENS", 48)


@pytest.mark.parametrize("model_type", ALL)
def test_stream_gives_the_hidden_states_of_the_model(tiny, model_type):
    model = tiny(model_type)
    stream = stream_of(model)
    received = {}

    def note(layer, args, kwargs):
        received[layer] = args[0] if args else kwargs["hidden_states"]

    layers = list(model.get_submodule(describe(model).layers))
    for layer in layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    inputs = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    stream.embed(IDS)
    for index in range(len(stream.layers)):
        assert torch.allclose(torch.cat(stream._hidden), received[layers[index]], atol=2e-5)
        with stream.layer(index):
            stream.advance(index)
        assert all(parameter.is_meta for parameter in stream.model.parameters())
    seen = []
    stream.watch_head(seen.append)
    assert torch.allclose(torch.cat(seen), inputs[0], atol=2e-5)


def test_a_failure_at_the_head_leaves_no_hook(tiny):
    stream = stream_of(tiny("llama", num_hidden_layers=1))
    stream.embed(IDS)

    def fail(_):
        raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        stream.watch_head(fail)
    assert not stream.model.get_output_embeddings()._forward_pre_hooks


def test_only_one_layer_holds_weights(tiny):
    stream = stream_of(tiny("llama"))
    stream.embed(IDS)
    with stream.layer(1):
        full = {name for name, p in stream.model.named_parameters() if not p.is_meta}
    assert full == {name for name, _ in stream.model.named_parameters() if name.startswith("model.layers.1.")}


@pytest.mark.parametrize("model_type", known_architectures())
def test_discovery_finds_what_the_data_say(tiny, model_type):
    model = tiny(model_type)
    unfuse_experts(model)
    stream = stream_of(model)
    stream.embed(IDS)
    with stream.layer(0) as layer:
        data = describe(model).architecture.in_layer(layer)
        stages = stream.discover(0, list(named_linears(layer)))
    found, known = sets(stages), sets(stages_by_role(data.sequential))
    assert found == known
    assert all(len(stage) == 1 for stage in stages) or any("experts" in name for name in named_linears(layer))


def sets(stages):
    """Order counts among stages alone: experts come as the first token chooses."""
    return [{frozenset(group) for group in stage} for stage in stages]


def test_watching_shows_every_token_once_and_stops_early(tiny):
    model = tiny("llama")
    stream = stream_of(model)
    stream.embed(IDS)
    seen, late = [], []
    with stream.layer(0) as layer:
        layer.mlp.register_forward_pre_hook(lambda *_: late.append(1))
        stream.run(0, watch={"self_attn.q_proj": seen.append})
    assert [tuple(x.shape) for x in seen] == [(2, 24, 64), (2, 24, 64), (1, 24, 64)]
    assert not late
    # Watching does not move the states on.
    expected = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS))
    assert torch.allclose(torch.cat(seen), expected, atol=1e-5)


def test_experts_are_one_stage(tiny):
    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)

        def forward(self, x):
            return self.down(self.up(x))

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(64, 3)
            self.experts = torch.nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            # The third expert is never chosen.
            return self.gate(x)[..., :1] * self.experts[0](x * 2) + self.experts[1](x * 3)

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = Experts()
    stream = stream_of(model)
    stream.embed(IDS)
    with stream.layer(0) as layer:
        stages = stream.discover(0, list(named_linears(layer)))
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert stages == [
        (tuple(names),),
        (("self_attn.o_proj",),),
        (("mlp.gate",),),
        (("mlp.experts.0.up",), ("mlp.experts.1.up",), ("mlp.experts.2.up",)),
        (("mlp.experts.0.down",), ("mlp.experts.1.down",), ("mlp.experts.2.down",)),
    ]


def test_a_model_that_is_no_chain_is_refused(tiny):
    model = tiny("llama")
    stream = stream_of(model)
    stream.layers = list(reversed(stream.layers))
    with pytest.raises(UnsupportedError, match="not called in order"):
        stream.embed(IDS)


def test_skeleton_has_real_buffers_and_no_weights(tiny):
    for model_type in ("llama", "gemma2"):
        model = tiny(model_type)
        skeleton = meta_model(model.config)
        assert all(parameter.is_meta for parameter in skeleton.parameters())
        for name, buffer in model.named_buffers():
            assert torch.equal(skeleton.get_buffer(name), buffer), name


def test_copy_without_weights_leaves_the_model_alone(tiny):
    model = tiny("qwen2")
    copied = meta_copy(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    with filled(copied, weights_of(model)):
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        with torch.no_grad():
            assert torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert all(parameter.is_meta for parameter in copied.parameters())


def test_names_of_a_bare_decoder_are_matched(tiny):
    model = tiny("gpt2")
    stored = [name.removeprefix("transformer.") for name in model.state_dict() if name != "lm_head.weight"]
    names, missing = bind_names(meta_copy(model), stored)
    assert missing == []
    assert names["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert names["lm_head.weight"] == names["transformer.wte.weight"] == "wte.weight"


def test_missing_names_are_reported(tiny):
    names, missing = bind_names(tiny("llama"), ["model.norm.weight"])
    assert names == {"model.norm.weight": "model.norm.weight"}
    assert "model.layers.0.mlp.up_proj.weight" in missing


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_tensor(tiny, value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    stream = stream_of(model)
    with stream.layer(0):
        pass
    with (
        pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or Inf"),
        stream.layer(1),
    ):
        pass
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def test_shapes_are_checked_against_the_config(tiny):
    weights = weights_of(tiny("llama"))
    skeleton = meta_model(tiny("llama", intermediate_size=128).config)
    with (
        pytest.raises(FormatError, match=r"must be \[128, 64\] by the config: got \[96, 64\]"),
        filled(skeleton, weights),
    ):
        pass


def test_more_that_depends_on_the_tokens_is_refused(tiny):
    model = tiny("llama")
    stream = stream_of(model)
    # As models with an embedding for each layer do: what the layer is given differs from chunk to chunk.
    forward = stream.model.model.forward

    def with_ids(input_ids, **kwargs):
        return forward(input_ids=input_ids, token_ids=input_ids, **kwargs)

    stream.model.model.forward = with_ids
    with pytest.raises(UnsupportedError, match="hands its layers more than hidden states"):
        stream.embed(IDS)
    stream.embed(IDS[:1].expand(5, -1))


def test_products_are_fp32_and_the_setting_is_as_before():
    a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    setting, everywhere = torch.backends.mkldnn.matmul, torch.backends.mkldnn
    before = setting.fp32_precision
    with products.fast_products(torch.device("cpu")):
        product = a @ b
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert setting.fp32_precision == before
    try:  # what was inherited still is, and what was set is kept
        everywhere.fp32_precision = "tf32"
        with products.fast_products(torch.device("cpu")):
            pass
        everywhere.fp32_precision = "ieee"
        assert setting.fp32_precision == "ieee"
        setting.fp32_precision = "tf32"
        with products.fast_products(torch.device("cpu")):
            pass
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = everywhere.fp32_precision = "none"


def test_a_cpu_that_rounds_to_bf16_is_left_alone(monkeypatch):
    class Rounds:
        fp32_precision = "none"

    def product(self, other):
        low = Rounds.fp32_precision == "bf16"
        return (matmul(self.bfloat16(), other.bfloat16()) if low else matmul(self, other)).to(self.dtype)

    matmul = torch.matmul
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", Rounds)
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(products, "_is_fp32", products._is_fp32.__wrapped__)
    with products.fast_products(torch.device("cpu")):
        assert Rounds.fp32_precision == "none"
    assert Rounds.fp32_precision == "none"
