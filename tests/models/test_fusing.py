"""fuse_forwards: the same bits from one call for q, k, v and one for gate, up; nothing else changes."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn

from qkern.models import fuse_forwards
from qkern.nn import QuantLinear, SharedInput, quant_linears, replace_linears

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def made(kind: str, scheme: str = "w4g32", **changes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    replace_linears(model, scheme, skip=("lm_head",))
    return model


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many weights each grouped call had."""
    seen: list[int] = []
    from qkern.ops.dequant_matmul import LinearGroup

    plain = LinearGroup.__call__

    def counting(self, x, biases, compute="int8"):
        seen.append(len(biases))
        return plain(self, x, biases, compute)

    monkeypatch.setattr(LinearGroup, "__call__", counting)
    return seen


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2"])
def test_same_bits(kind: str, compute: str, tokens: torch.Tensor, calls: list[int]) -> None:
    model = made(kind)
    for linear in quant_linears(model).values():
        linear.compute = compute
    before = logits(model, tokens)
    names = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    assert fuse_forwards(model) == 4
    assert fuse_forwards(model) == 0
    assert torch.equal(logits(model, tokens), before)
    assert calls == [3, 2, 3, 2]
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert type(model.model.layers[0].mlp).__name__ == f"{kind}MLP"


@pytest.mark.parametrize("scheme", ["w2g32", "w3g32z", "w8", "nf4g32", "w8a8", "w4g128"])
def test_schemes(scheme: str, tokens: torch.Tensor) -> None:
    model = made("Llama", scheme)
    before = logits(model, tokens)
    fuse_forwards(model)
    assert torch.equal(logits(model, tokens), before)


def test_generates(tokens: torch.Tensor) -> None:
    model = made("Llama")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(tokens, **options)
    fuse_forwards(model)
    assert torch.equal(model.generate(tokens, **options), before)


def test_copies_and_pickles(tokens: torch.Tensor, calls: list[int]) -> None:
    model = made("Qwen2")
    fuse_forwards(model)
    before = logits(model, tokens)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        logits(other, tokens)  # packs
        calls.clear()
        assert torch.equal(logits(other, tokens), before)
        assert calls == [3, 2, 3, 2]
        first, copied = model.model.layers[0].mlp, other.model.layers[0].mlp
        assert type(first) is type(copied)
        assert first.gate_proj is not copied.gate_proj


def test_a_replaced_weight_is_used(tokens: torch.Tensor) -> None:
    model = made("Llama")
    fuse_forwards(model)
    logits(model, tokens)
    attention = model.model.layers[0].self_attn
    attention.k_proj = QuantLinear.from_linear(nn.Linear(64, 32, bias=False), "w4g32")
    other = copy.deepcopy(model)
    plain = made("Llama")
    plain.model.layers[0].self_attn.k_proj = copy.deepcopy(attention.k_proj)
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert torch.equal(logits(other, tokens), logits(plain, tokens))


def test_mixed_schemes_and_wrapped_linears_run_alone(tokens: torch.Tensor, calls: list[int]) -> None:
    model = made("Llama")
    fuse_forwards(model)
    logits(model, tokens)
    for layer in model.model.layers:
        layer.self_attn.v_proj = QuantLinear.from_linear(nn.Linear(64, 32), "w8")
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    calls.clear()
    logits(model, tokens)
    assert calls == []


def test_hooks_see_every_linear(tokens: torch.Tensor, calls: list[int]) -> None:
    model = made("Llama")
    fuse_forwards(model)
    before = logits(model, tokens)
    seen = []
    linear = model.model.layers[0].self_attn.k_proj
    hook = linear.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    calls.clear()
    assert torch.equal(logits(model, tokens), before)
    assert seen == [(2, 9, 32)]
    assert calls == [2, 3, 2]
    hook.remove()
    logits(model, tokens)
    assert len(seen) == 1


def test_gradients_flow(tokens: torch.Tensor) -> None:
    model = made("Llama")
    for linear in quant_linears(model).values():
        linear.compute = "float"
    x = model.get_input_embeddings()(tokens).detach()
    gradients = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.sum().backward()
        gradients.append(leaf.grad)
        fuse_forwards(model)
    assert torch.equal(*gradients)


def test_compiles_whole(tokens: torch.Tensor) -> None:
    model = made("Llama")
    before = logits(model, tokens)
    fuse_forwards(model)
    logits(model, tokens)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        out = compiled(tokens, use_cache=False).logits
    assert torch.equal(out, before)
    called = [
        str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"
    ]
    assert sum("dequant_matmul_group" in name for name in called) == 4
    torch._dynamo.reset()


def test_no_output_is_kept(tokens: torch.Tensor) -> None:
    import weakref

    layer = made("Llama")
    fuse_forwards(layer)
    mlp = layer.model.layers[0].mlp
    with torch.no_grad():
        mlp(torch.randn(1, 3, 64))
        x = torch.randn(1, 3, 64)
        out = weakref.ref(mlp(x))
        shared = mlp._shared_input([mlp.gate_proj, mlp.up_proj], x)
        refs = [weakref.ref(each) for each in shared]
        del shared, x
    assert out() is None
    assert all(ref() is None for ref in refs)


def test_threads_at_once(tokens: torch.Tensor) -> None:
    model = made("Llama")
    fuse_forwards(model)
    before = logits(model, tokens)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(5):
            if not torch.equal(logits(model, tokens), before):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_unknown_architecture_and_bare_decoder_are_left_alone() -> None:
    assert fuse_forwards(nn.Sequential(nn.Linear(4, 4))) == 0
    assert fuse_forwards(made("Llama").model) == 0


def test_a_patched_class_is_obeyed(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = made("Llama")
    fuse_forwards(model)
    before = logits(model, tokens)
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * plain(self, x))
    patched = logits(model, tokens)
    assert not torch.equal(patched, before)
    later = made("Llama")
    fuse_forwards(later)
    assert torch.equal(logits(later, tokens), patched)


def test_what_a_forward_sets_on_its_self_stays(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward

    def forward(self, x):
        self.seen = tuple(x.shape)
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    model = made("Llama")
    fuse_forwards(model)
    logits(model, tokens)
    logits(model, tokens)
    assert model.model.layers[0].mlp.seen == (2, 9, 64)
    assert set(vars(model.model.layers[0].mlp)) & {"_owner", "_done"} == set()


def test_a_forward_that_calls_super_is_left_alone(tokens: torch.Tensor) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Own(LlamaMLP):
        def forward(self, x):
            return super().forward(x)

    model = made("Llama")
    before = logits(model, tokens)
    for layer in model.model.layers:
        layer.mlp.__class__ = Own
    assert fuse_forwards(model) == 2
    assert torch.equal(logits(model, tokens), before)


def test_pickles_after_compiling_a_module() -> None:
    model = made("Llama")
    fuse_forwards(model)
    model.model.layers[0].mlp.compile()
    assert copy.deepcopy(model) is not None
    torch.save(model, io.BytesIO())


def test_gradients_of_an_exported_module() -> None:
    model = made("Llama")
    fuse_forwards(model)
    mlp = model.model.layers[0].mlp
    for linear in quant_linears(mlp).values():
        linear.compute = "float"
    x = torch.randn(3, 64)
    with torch.no_grad():
        mlp(x)
        exported = torch.export.export(mlp, (x,)).module()
    gradients = []
    for run in (mlp, exported):
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_weights_that_went_are_not_kept(tokens: torch.Tensor) -> None:
    import gc
    import weakref

    model = made("Llama")
    fuse_forwards(model)
    logits(model, tokens)
    logits(model, tokens)
    mlp = model.model.layers[0].mlp
    blob = weakref.ref(mlp.gate_proj.blob)
    for linear in quant_linears(mlp).values():
        linear.unpack()
    with torch.no_grad():
        mlp(torch.randn(2, 64))
    gc.collect()
    assert blob() is None


def test_shared_input_refuses_what_it_cannot_join() -> None:
    linears = [QuantLinear.from_linear(nn.Linear(64, 32), "w4g32").pack() for _ in range(2)]
    shared = SharedInput()
    x = torch.randn(3, 64)
    with torch.no_grad():
        outs = shared(linears, x)
        assert outs is not None
        for linear, out in zip(linears, outs, strict=True):
            assert torch.equal(linear(x), out)
        assert shared([nn.Linear(64, 32), linears[0]], x) is None
        assert shared(linears, torch.empty(0, 64))[0].shape == (0, 32)
        linears[0].compute = "float"
        assert shared(linears, x) is None
