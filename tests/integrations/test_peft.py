"""LoRA over quantized linears: the numbers of a dense base, training, several adapters, merging."""

from __future__ import annotations

import copy
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

import qkern
from qkern.demo import CALIBRATION, HELDOUT, MODEL
from qkern.errors import InputError
from qkern.evaluation import kl_divergence, paired_bootstrap, read_text, token_ids, window_logits
from qkern.integrations import peft as qpeft
from qkern.nn import QuantLinear, quant_linears
from qkern.nn.state import form_of
from qkern.ops import dequantize_groupwise
from qkern.quantizers import requantize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = torch.randint(0, 96, (3, 11), generator=torch.Generator().manual_seed(0))
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
FORMATS = {"w4g32z": "awq", "w4g32": "gptq", "w3g32": "compressed-tensors", "w8": "compressed-tensors"}


@pytest.fixture
def fresh(folders: dict[str, Path]) -> Callable[..., Any]:
    """Maker of a model that was loaded just now."""

    def load(spelling: str = "w4g32z", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return qkern.load(folders[spelling], dtype=dtype, **options)

    return load


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def adapted(model: Any, name: str = "default", *, seed: int = 0, **options: Any) -> PeftModel:
    """`model` with an adapter that does something."""
    made = model
    if isinstance(model, PeftModel):
        model.add_adapter(name, config(**options))
    else:
        made = get_peft_model(model, config(**options), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in made.named_parameters():
        if f".{name}." in key and ("lora_A" in key or "lora_B" in key):
            parameter.data.normal_(std=0.1, generator=generator)
        if f".{name}." in key and "magnitude" in key:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return made.eval()


def densified(model: Any) -> Any:
    """The same model with each quantized linear decoded."""
    model = copy.deepcopy(model)
    for name, linear in quant_linears(model).items():
        model.set_submodule(name, linear.to_linear())
    return model


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS, **options).logits
    return result


def form(model: Any) -> dict[str, torch.Tensor]:
    """All bytes of the quantized weights."""
    return {
        f"{name}.{part}": tensor
        for name, linear in quant_linears(model).items()
        for part, tensor in form_of(linear.quantized()).items()
        if tensor is not None
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


# Numbers ------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of the input and of A and B."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * weights).sum().backward()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    return [y.detach(), x.grad, *(parameter.grad for parameter in adapters)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("spelling", ["w2g16", "w4g32z", "nf4g32"])
def test_gradients_are_those_of_a_dense_base(spelling: str, use_rslora: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = QuantLinear.from_linear(nn.Linear(96, 40), spelling)
    x, weights = torch.randn(2, 7, 96).to(dtype), torch.randn(2, 7, 40)
    found = {}
    for name, layer in (("quantized", base), ("dense", base.to_linear(dtype))):
        model = adapted(nn.Sequential(layer), target_modules=["0"], use_rslora=use_rslora)
        found[name] = gradients(model, x, weights)
    A, B = (p.detach().double().requires_grad_() for n, p in model.named_parameters() if "lora_" in n)
    exact = x.double().requires_grad_()
    scaling = 8 / (4**0.5 if use_rslora else 4)
    W = base.dequantize().double()
    y = exact @ W.T + base.bias.double() + scaling * (exact @ A.T) @ B.T  # type: ignore[union-attr]
    (y * weights).sum().backward()
    for ours, theirs, truth in zip(
        found["quantized"], found["dense"], (y.detach(), exact.grad, A.grad, B.grad), strict=True
    ):
        assert ours.dtype == theirs.dtype
        budget = 2 * (theirs.double() - truth).norm() + 1e-12
        assert (ours.double() - truth).norm() <= budget


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_is_that_over_a_dense_base(fresh: Callable[..., Any], dropout: float) -> None:
    base = fresh(compute="float")
    found = []
    for model in (base, densified(base)):
        model = adapted(model, use_dora=True, lora_dropout=dropout).train()
        torch.manual_seed(3)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append([loss, *(p.grad for n, p in model.named_parameters() if "lora_" in n)])
    assert len(found[0]) == 1 + 3 * 14
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_training_computes_in_float_and_inference_as_the_layer_says(fresh: Callable[..., Any]) -> None:
    model = adapted(fresh(), target_modules=["v_proj"])
    inference = logits(model)
    training = logits(model.train())
    exact = logits(adapted(fresh(compute="float"), target_modules=["v_proj"]))
    assert torch.equal(training, exact)
    assert not torch.equal(inference, exact)
    assert torch.equal(logits(model.eval()), inference)
    named = adapted(fresh(compute="int8"), target_modules=["v_proj"])
    assert torch.equal(logits(named.train()), inference)


# Training -----------------------------------------------------------------------------------------------


def test_prepared_model_checkpoints_and_keeps_its_scales(fresh: Callable[..., Any]) -> None:
    model = fresh("w4g32", torch.bfloat16)
    before = form(model)
    assert prepare_model_for_kbit_training(model) is model
    assert model.is_activation_checkpointing
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same(form(model), before)
    assert model.num_parameters() > 0  # which asks for bitsandbytes if a model says that it has 4 bits


def test_checkpointing_gives_the_same_gradients(fresh: Callable[..., Any]) -> None:
    found = []
    for use_checkpoints in (False, True):
        model = prepare_model_for_kbit_training(fresh(), use_gradient_checkpointing=use_checkpoints)
        model = adapted(model, target_modules=["q_proj"]).train()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append([loss, *(p.grad for n, p in model.named_parameters() if "lora_" in n)])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


def trained_by_trainer(model: Any, folder: Path, steps: int) -> Any:
    """Result of the Trainer, which leaves a checkpoint of the last step in `folder`."""
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=1e-2, use_cpu=True, report_to="none"
    )
    return Trainer(model=model, args=arguments, train_dataset=data).train()


def test_trainer_trains_the_adapter_alone(fresh: Callable[..., Any], tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(fresh("w4g32", torch.bfloat16))
    before = form(base)
    model = get_peft_model(base, config(lora_dropout=0.1))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = trained_by_trainer(model, tmp_path, 2)
    assert result.global_step == 2
    assert 0 < result.training_loss < 20
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    assert_same(
        {name.replace(".base_layer", ""): value for name, value in form(model.base_model.model).items()},
        before,
    )
    saved = PeftModel.from_pretrained(fresh("w4g32", torch.float32), str(tmp_path / "checkpoint-2"))
    assert logits(saved).isfinite().all()


def test_trainer_saves_the_adapter_of_transformers(fresh: Callable[..., Any], tmp_path: Path) -> None:
    model = fresh()
    model.add_adapter(config(target_modules=["q_proj"]))
    trained_by_trainer(model, tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    assert not (folder / "model.safetensors").exists()
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 2
    again = fresh()
    again.load_adapter(str(folder))
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    assert not torch.equal(logits(again), logits(fresh()))


def test_biases_are_trained_where_asked(fresh: Callable[..., Any]) -> None:
    found = []
    for model in (base := fresh(compute="float"), densified(base)):
        model = adapted(model, target_modules=["q_proj"], bias="lora_only").train()
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for n, p in model.named_parameters() if p.requires_grad])
    assert len(found[0]) == 3 * 2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_twenty_steps_bring_the_shipped_model_closer_to_the_original() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    heldout = token_ids(tokenizer, read_text(HELDOUT))[:4096]
    batches = token_ids(tokenizer, read_text(CALIBRATION))[: 20 * 4 * 64].view(20, 4, 64)
    original, base = qkern.load(MODEL), qkern.load(MODEL)
    qkern.replace_linears(base, "w2g64")
    expected = window_logits(original, heldout)
    before = kl_divergence(expected, base, heldout, allow_short=True)
    torch.manual_seed(0)
    model = get_peft_model(base, config(r=16, lora_alpha=16)).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for ids in batches:
        with torch.no_grad():
            teacher = original(ids).logits.float().softmax(-1).flatten(0, 1)
        student = model(ids).logits.float().flatten(0, 1)
        nn.functional.cross_entropy(student, teacher).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = kl_divergence(expected, model.eval(), heldout, allow_short=True)
    assert paired_bootstrap(after, before).high < -0.1


# Adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_adapter_is_the_same_on_a_base_loaded_anew(
    fresh: Callable[..., Any], tmp_path: Path, kind: str, low_memory: bool
) -> None:
    model = adapted(fresh(), **KINDS[kind])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in stored)
    assert len(stored) == 14 * (3 if kind == "dora" else 2)
    again = PeftModel.from_pretrained(fresh(), str(tmp_path), low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(again), expected)
    assert not torch.equal(expected, logits(fresh()))


def test_all_linear_means_quantized_ones_too(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    dense = set(get_peft_model(copy.deepcopy(model), config()).peft_config["default"].target_modules)
    qkern.replace_linears(model, "w4g32", skip=("*.layers.0.*",))  # the head too, which gets no adapter
    assert isinstance(model.lm_head, QuantLinear)
    mixed = get_peft_model(model, config())
    mixed.add_adapter("second", config(target_modules="all-linear"))
    layers = mixed.base_model.model
    for adapter in ("default", "second"):
        assert mixed.peft_config[adapter].target_modules == dense
        assert {
            name for name, layer in layers.named_modules() if adapter in getattr(layer, "lora_A", ())
        } == dense
    assert isinstance(layers.model.layers[1].mlp.up_proj, qpeft.LoraQuantLinear)
    assert not isinstance(layers.model.layers[0].mlp.up_proj, qpeft.LoraQuantLinear)


def test_adapters_are_chosen_combined_and_switched_off(fresh: Callable[..., Any]) -> None:
    plain = logits(fresh())
    model = adapted(fresh(), "first")
    first = logits(model)
    model = adapted(model, "second", seed=1, use_rslora=True, r=2, target_modules=["v_proj", "down_proj"])
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    rows = logits(model, adapter_names=["second", "__base__", "first"])
    for row, expected in zip(rows, (second[0], plain[1], first[2]), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_adapter_of_transformers_itself(fresh: Callable[..., Any]) -> None:
    model = fresh()
    model.add_adapter(config())
    assert isinstance(model.model.layers[0].self_attn.q_proj, qpeft.LoraQuantLinear)
    with pytest.raises(InputError, match=r"adapters of PEFT \(default\)"):
        qkern.save(model, "never-written")


def test_conv1d_is_adapted_as_any_other(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    qkern.replace_linears(model, "w8")
    model = adapted(model, target_modules=["c_attn"], fan_in_fan_out=True)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.get_delta_weight("default").shape == (192, 64)
    for linear in quant_linears(model).values():
        linear.compute = "float"
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.05)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.1


# Merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_is_the_rounded_sum_and_unmerging_is_exact(
    fresh: Callable[..., Any], kind: str
) -> None:
    model = adapted(fresh(compute="float"), **KINDS[kind])
    before, expected = form(model), logits(model)
    dense = adapted(densified(fresh()), **KINDS[kind]).merge_and_unload()
    model.merge_adapter(safe_merge=True)
    layers = {
        name: layer
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, qpeft.LoraQuantLinear)
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        exact = dense.get_submodule(name).weight.detach()
        found, unmerged = layer.base_layer.dequantize(), layer.unmerged.dequantize()
        assert torch.equal(found, dequantize_groupwise(requantize(exact, layer.unmerged.quantized())))
        error, update = ((other - exact).norm() ** 2 / exact.norm() ** 2 for other in (found, unmerged))
        assert layer.merged_facts.error == pytest.approx(float(error), rel=1e-3)
        assert layer.merged_facts.update == pytest.approx(float(update), rel=1e-3)
        assert layer.merged_facts.error < 0.5 * layer.merged_facts.update
    assert not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same(form(model), before)
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(fresh(compute="float")))


def test_adapters_merged_in_turn_are_rounded_once(fresh: Callable[..., Any]) -> None:
    model = adapted(adapted(fresh(), "first"), "second", seed=1)
    model.merge_adapter(["first"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    in_turn = form(model)
    model.unmerge_adapter()
    model.merge_adapter(["first", "second"])
    assert_same(form(model), in_turn)


def test_what_is_merged_already_is_taken_out_first(tiny: Callable[..., Any]) -> None:
    base = tiny("llama")
    qkern.replace_linears(base, "w8", skip=("lm_head", "*.layers.0.*"))
    expected = qpeft.merge(adapted(copy.deepcopy(base))).model.state_dict()
    model = adapted(adapted(base), "second", seed=1)
    model.merge_adapter(["second"])
    found = qpeft.merge(model, adapter_names=["default"]).model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # Of a dense weight PEFT subtracts what it had added.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_an_adapter_that_does_nothing_changes_no_bit(fresh: Callable[..., Any]) -> None:
    expected = form(fresh("w3g32"))
    report = qpeft.merge(get_peft_model(fresh("w3g32"), config()))
    assert_same(form(report.model), expected)
    assert {(facts.update, facts.error) for facts in report.layers.values()} == {(0.0, 0.0)}


def test_peft_takes_its_layers_out(fresh: Callable[..., Any]) -> None:
    model = adapted(fresh(), target_modules=["q_proj"])
    model.merge_adapter()
    merged = form(model)
    out = adapted(fresh(), target_modules=["q_proj"]).merge_and_unload()
    assert_same(
        form(out),
        {name.replace("base_model.model.", "").replace(".base_layer", ""): merged[name] for name in merged},
    )
    assert torch.equal(logits(adapted(fresh()).unload()), logits(fresh()))


@pytest.mark.parametrize("spelling", FORMATS)
def test_merged_model_is_saved_in_every_format(
    fresh: Callable[..., Any], tmp_path: Path, spelling: str
) -> None:
    report = qpeft.merge(adapted(prepare_model_for_kbit_training(fresh(spelling, torch.bfloat16))))
    assert set(report.layers) == set(quant_linears(report.model))
    assert {facts.scheme for facts in report.layers.values()} == {spelling}
    assert {parameter.dtype for parameter in report.model.parameters()} == {torch.bfloat16}
    folder = tmp_path / "merged"
    qkern.save(report.model, folder, format=FORMATS[spelling], recipe={"merged": report.as_dict()})
    again = qkern.load(folder)
    assert_same(form(again), form(report.model))
    assert torch.equal(logits(again), logits(report.model))


def test_merged_model_is_exported_to_gguf_code_by_code(tmp_path: Path) -> None:
    model = qkern.load(MODEL)
    qkern.replace_linears(model, "w4g32")
    merged = qpeft.merge(adapted(model, target_modules=["q_proj", "down_proj"])).model
    qkern.save(merged, tmp_path / "merged", tokenizer=MODEL)
    qkern.export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", type="q4_0")
    exported = quant_linears(qkern.load(tmp_path / "merged.gguf"))
    assert len(exported) == 28
    for name, linear in quant_linears(merged).items():
        assert torch.equal(exported[name].dequantize(), linear.dequantize()), name


def test_dense_merge_is_a_16_bit_model_to_quantize_again(fresh: Callable[..., Any], tmp_path: Path) -> None:
    base = fresh()
    exact = adapted(densified(base), target_modules=["q_proj", "up_proj"]).merge_and_unload()
    report = qpeft.merge(adapted(base, target_modules=["q_proj", "up_proj"]), dtype=torch.bfloat16)
    assert not quant_linears(report.model)
    assert len(report.layers) == 4
    assert {facts.scheme for facts in report.layers.values()} == {"bfloat16"}
    for name, parameter in report.model.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).to(torch.bfloat16)), name
    assert report.model.config.dtype == torch.bfloat16
    qkern.save(report.model, tmp_path / "dense")
    report.model.save_pretrained(tmp_path / "theirs", variant="bf16")  # which no model of `load` takes
    assert (tmp_path / "theirs" / "model.bf16.safetensors").is_file()
    calibration = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    for source in (report.model, tmp_path / "dense"):
        again = qkern.quantize(source, method="gptq", scheme="w4g32", calibration=calibration)
        assert len(quant_linears(again)) == 14
        assert again.is_loaded_in_8bit


def test_merging_frees_each_layer_once_it_is_done(
    fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(fresh())
    layers = [weakref.ref(module) for module in model.modules() if isinstance(module, qpeft.LoraQuantLinear)]
    alive = []

    def counting(*arguments: Any) -> Any:
        alive.append(sum(layer() is not None for layer in layers))
        return requantize(*arguments)

    monkeypatch.setattr(qpeft, "requantize", counting)
    qpeft.merge(model)
    assert alive == list(range(14, 0, -1))


def test_a_merge_that_rounds_the_adapters_away_is_warned_of(
    fresh: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qkern")
    model = adapted(fresh())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.02
    report = qpeft.merge(model)
    assert all(0.5 * facts.update < facts.error <= facts.update for facts in report.layers.values())
    assert "merged default into model.layers.0.self_attn.q_proj as w4g32z: update" in caplog.text
    assert "took back more than half of what the adapters changed in 14 of 14 linears" in caplog.text


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_broken_adapter_is_not_merged(fresh: Callable[..., Any], safe_merge: bool) -> None:
    model = adapted(fresh())
    before = form(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=safe_merge)
    assert not layer.merged
    assert_same(form(model), before)


def computing_in_float(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose quantized linears do not look at that mode."""
    model = copy.deepcopy(model).eval()
    for linear in quant_linears(model).values():
        linear.compute = "float"
    return model


def test_base_of_a_merged_layer_is_trained_evaluated_and_moved_too(fresh: Callable[..., Any]) -> None:
    model = adapted(fresh())
    inference = logits(model)
    training = logits(model.train())
    model.merge_adapter()
    assert torch.equal(logits(model), logits(computing_in_float(model)))
    model.eval().unmerge_adapter()
    assert torch.equal(logits(model), inference)
    model.merge_adapter()
    model.train().unmerge_adapter()
    assert torch.equal(logits(model), training)
    model.merge_adapter()
    model.to("meta").unmerge_adapter()
    for linear in quant_linears(model).values():
        assert linear.quantized().codes.is_meta


def test_a_merge_that_fails_leaves_the_layers_to_peft(
    fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(fresh())
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    whole = layer.lora_B["default"].weight.detach().clone()
    layer.merge()
    layer.lora_B["default"].weight.data[3] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj: the adapter default has NaN"):
        qpeft.merge(model, dtype=torch.bfloat16)
    assert layer.merged
    assert len(quant_linears(model)) == 14
    layer.lora_B["default"].weight.data.copy_(whole)
    monkeypatch.setattr(type(layer), "dense", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qpeft.merge(model, dtype=torch.bfloat16)
    monkeypatch.undo()
    model.merge_adapter()
    assert isinstance(layer.base_layer, QuantLinear)
    assert layer.merge_report is None


def test_a_broken_adapter_that_is_not_active_is_no_hindrance(fresh: Callable[..., Any]) -> None:
    model = adapted(adapted(fresh(), "first"), "second", seed=1)
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["second"].weight.data[3] = torch.inf
    with pytest.raises(InputError, match="the adapter second has NaN or Inf"):
        qpeft.merge(model, adapter_names=["first", "second"])
    assert len(qpeft.merge(model).layers) == 14


def test_unmerging_nothing_warns_as_peft_does(fresh: Callable[..., Any]) -> None:
    layer = adapted(fresh()).base_model.model.model.layers[0].self_attn.q_proj
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
