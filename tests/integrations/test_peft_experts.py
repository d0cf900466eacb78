"""LoRA on experts that are linears: what targets reach, training, adapters on disk, merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qkern
from qkern.errors import UnsupportedError
from qkern.integrations import peft as qpeft
from qkern.nn import Experts, compute_mode, expert_parameters, quant_linears, stored_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
KINDS = ("mixtral", "qwen3_moe")
LOADERS = {"load": qkern.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}
EXPERT = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def mixtures(originals: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of quantized mixtures by kind, two layers of four experts each."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp("quantized") / kind
        qkern.quantize(
            originals(kind, moe_intermediate_size=64), scheme="w4g32", method="rtn", output=made[kind]
        )
    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=LOADERS)
def fresh(request: pytest.FixtureRequest, mixtures: dict[str, Path], kind: str) -> Callable[[], Any]:
    """Maker of a model that was loaded just now."""
    return lambda: LOADERS[request.param](mixtures[kind], dtype=torch.float32)


def config(targets: Any = EXPERT, **options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": targets, **options}
    )


def adapted(model: Any, *arguments: Any, **options: Any) -> Any:
    """`model` with adapters that do something."""
    torch.manual_seed(0)
    return get_peft_model(model, config(*arguments, **options)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), compute_mode(model, "float"):
        result: torch.Tensor = model(IDS).logits
    return result


def reached(model: Any) -> set[str]:
    """Names of the linears with an adapter, as the model without adapters has them."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, qpeft.LoraQuantLinear)
    }


def linears(*names: str) -> set[str]:
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}"
        for layer in range(2)
        for expert in range(4)
        for name in names
    }


ATTENTION = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"}
QUERIES = {name for name in ATTENTION if "q_proj" in name}
TARGETS: dict[str, tuple[Any, set[str]]] = {
    "all": ("all-linear", ATTENTION | linears(*EXPERT)),
    "names": (EXPERT, linears(*EXPERT)),
    "one of a stack": (["q_proj", "up_proj"], QUERIES | linears("up_proj")),
    "ends": (["experts.2.down_proj"], {name for name in linears("down_proj") if ".2." in name}),
    "pattern": (
        r".*layers\.1\..*experts\.\d\.gate_proj",
        {n for n in linears("gate_proj") if "layers.1" in n},
    ),
}


@pytest.mark.parametrize("what", TARGETS)
def test_targets_reach_the_linears_of_experts(fresh: Callable[[], Any], what: str) -> None:
    targets, expected = TARGETS[what]
    assert reached(adapted(fresh(), targets)) == expected
    native = fresh()
    native.add_adapter(config(targets))
    assert reached(native) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "w1"], QUERIES | linears("gate_proj")),
        (["block_sparse_moe.experts.0.w2"], {name for name in linears("down_proj") if "experts.0" in name}),
        (r".*\.block_sparse_moe\..*\.w3", linears("up_proj")),
    ],
)
def test_targets_may_have_the_names_of_the_checkpoint(
    mixtures: dict[str, Path], targets: Any, expected: set[str]
) -> None:
    model = qkern.load(mixtures["mixtral"])
    assert reached(adapted(model, targets)) == expected
    without = adapted(qkern.load(mixtures["mixtral"]), "all-linear", exclude_modules=["w1", "w2", "q_proj"])
    assert reached(without) == (ATTENTION - QUERIES) | linears("up_proj")


def test_gradients_are_those_of_a_dense_base(fresh: Callable[[], Any]) -> None:
    found = []
    for dense in (False, True):
        base = fresh()
        for name, linear in quant_linears(base).items() if dense else ():
            base.set_submodule(name, linear.to_linear())
        model = adapted(prepare_model_for_kbit_training(base), "all-linear").train()
        assert model.base_model.model.is_gradient_checkpointing
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        gradients = {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        assert len(gradients) == 2 * 32
        found.append((loss.detach(), gradients))
    assert all(gradient is not None and gradient.any() for gradient in found[0][1].values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_adapters_are_saved_and_loaded(fresh: Callable[[], Any], tmp_path: Path) -> None:
    for targets in ("all-linear", EXPERT, ["up_proj"]):
        model = adapted(fresh(), targets)
        plain = logits(fresh())
        assert not torch.allclose(logits(model), plain)
        model.save_pretrained(tmp_path / "adapter")
        for again in (PeftModel.from_pretrained(fresh(), tmp_path / "adapter"), fresh()):
            if not isinstance(again, PeftModel):
                again.load_adapter(tmp_path / "adapter")
            assert reached(again) == reached(model)
            assert torch.equal(logits(again), logits(model))
        native = fresh()
        torch.manual_seed(0)
        native.add_adapter(config(targets))
        native.save_pretrained(tmp_path / "native")
        again = PeftModel.from_pretrained(fresh(), tmp_path / "native")
        assert torch.equal(logits(again), logits(native.eval()))


def test_adapters_with_the_names_of_the_checkpoint(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """As they were trained before transformers stacked experts."""
    model = adapted(qkern.load(mixtures["mixtral"]), ["q_proj", "w1", "w2", "w3"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {stored_name("mixtral", name): tensor for name, tensor in load_file(file).items()}
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight" in renamed
    save_file(renamed, file, metadata={"format": "pt"})
    native = qkern.load(mixtures["mixtral"])
    native.load_adapter(tmp_path)
    for again in (native, PeftModel.from_pretrained(qkern.load(mixtures["mixtral"]), tmp_path)):
        assert torch.equal(logits(again), logits(model))


def test_a_second_adapter(fresh: Callable[[], Any]) -> None:
    model = adapted(fresh(), ["down_proj"])
    torch.manual_seed(1)
    model.add_adapter("other", config(["up_proj"]))
    assert reached(model) == linears("down_proj", "up_proj")
    first = logits(model.eval())
    model.set_adapter("other")
    assert not torch.allclose(first, logits(model))


def test_merging(fresh: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(fresh())
    before = logits(model)
    report = qpeft.merge(adapted(fresh()))
    assert report.layers.keys() == linears(*EXPERT)
    assert {str(layer.scheme) for layer in quant_linears(report.model).values()} == {"w4g32"}
    report.model.save_pretrained(tmp_path / "merged")
    for load in LOADERS.values():
        assert torch.equal(logits(load(tmp_path / "merged")), logits(report.model))
    dense = qpeft.merge(model, dtype=torch.float32).model
    assert not quant_linears(dense)
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(found.values())
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys"
)  # PEFT's, of what it made itself
def test_stacks_are_refused_with_what_to_write(
    mixtures: dict[str, Path], tiny: Any, tmp_path: Path, kind: str
) -> None:
    for targets in (["down_proj"], ["q_proj.weight", "mlp.experts.gate_up_proj"]):
        linears = "'down_proj'" if targets == ["down_proj"] else "'gate_proj', 'up_proj'"
        with pytest.raises(
            UnsupportedError, match=rf"target_parameters names {targets[-1]}: .* target_modules=\[{linears}\]"
        ):
            adapted(qkern.load(mixtures[kind]), ["q_proj"], target_parameters=targets)
    # As PEFT has them for the 16-bit model.
    names = ["w1", "w2", "w3"] if kind == "mixtral" else EXPERT
    stacked = adapted(tiny(kind, moe_intermediate_size=64), names)
    assert not reached(stacked)
    stacked.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="names down_proj, gate_up_proj: stacks of experts"):
        PeftModel.from_pretrained(qkern.load(mixtures[kind]), tmp_path)


def test_16_bit_experts_beside_quantized_linears(tiny: Any, tmp_path: Path, kind: str) -> None:
    model = tiny(kind, moe_intermediate_size=64)
    qkern.replace_linears(model, "w4g32", skip=["lm_head", "gate", "experts"])
    qkern.save(model, tmp_path / "base")
    before = logits(model)
    assert expert_parameters(model)
    model = adapted(model, ["q_proj", *EXPERT])
    assert reached(model) == QUERIES
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert [len(layer) for layer in experts] == [4, 4]
    for linear in (getattr(expert, name) for layer in experts for expert in layer for name in EXPERT):
        assert isinstance(linear, Linear)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(qkern.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_16_bit_mixtures_are_left_to_peft(tiny: Any, kind: str) -> None:
    model = adapted(tiny(kind), ["w1", "w2", "w3"] if kind == "mixtral" else EXPERT)
    assert model.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}
    assert not any(isinstance(module, Experts) for module in model.modules())
