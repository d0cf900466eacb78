"""LoRA over models that transformers loaded, and over layers with outliers: preparing, merging, saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

import qkern
from qkern.integrations import peft as qpeft
from qkern.integrations.hf_config import QkernConfig
from qkern.nn import OutlierLinear, quant_linears

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = torch.randint(0, 96, (3, 11), generator=torch.Generator().manual_seed(0))


def adapted(model: Any) -> PeftModel:
    """`model` with an adapter that does something."""
    torch.manual_seed(0)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def test_prepared_models_checkpoint_however_they_were_loaded(
    tiny: Callable[..., Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained
    for model in (
        qkern.load(tmp_path / "dense", int8=True),
        *map(theirs, folders.values()),
        theirs(tmp_path / "dense", quantization_config=QkernConfig("w4g32")),
    ):
        assert prepare_model_for_kbit_training(model).is_gradient_checkpointing
    plain = theirs(folders["w8"]).dequantize()
    assert not prepare_model_for_kbit_training(plain).is_gradient_checkpointing


@pytest.mark.parametrize(
    ("spelling", "quantization"), [("w4g32", None), ("w4g32z", None), (None, "w4g32"), (None, "nf4g32d")]
)
def test_models_of_from_pretrained_are_merged_too(
    tiny: Callable[..., Any],
    folders: dict[str, Path],
    tmp_path: Path,
    spelling: str | None,
    quantization: str | None,
) -> None:
    def load() -> Any:
        if spelling is not None:
            return AutoModelForCausalLM.from_pretrained(folders[spelling])
        tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=QkernConfig(str(quantization))
        )

    base = load()
    merged = qpeft.merge(adapted(base)).model
    assert merged is base
    assert {str(layer.scheme) for layer in quant_linears(merged).values()} == {spelling or quantization}
    assert merged.quantization_method == merged.config.quantization_config.quant_method
    merged.save_pretrained(tmp_path / "merged")
    saved, held = (quant_linears(model) for model in (qkern.load(tmp_path / "merged"), merged))
    assert saved.keys() == held.keys()
    for name, layer in held.items():
        torch.testing.assert_close(dict(saved[name].state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
    exact = qpeft.merge(adapted(load()), dtype=torch.bfloat16).model
    assert not hasattr(exact, "hf_quantizer")
    exact.save_pretrained(tmp_path / "exact")
    again = qkern.load(tmp_path / "exact")
    assert not quant_linears(again)
    assert torch.equal(logits(again), logits(exact))


def test_kernels_that_cannot_merge_are_left_to_peft(tiny: Callable[..., Any]) -> None:
    model = adapted(tiny("llama"))
    model.base_model.model.quantization_method = "gptq"
    with pytest.raises(ValueError, match="when the model is gptq quantized"):
        model.merge_and_unload()


def test_outlier_linears_stay_what_they_are(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = qkern.load(tmp_path / "dense", int8=True, compute="int8")
    for layer in quant_linears(model).values():
        layer.threshold = 4.5  # type: ignore[attr-defined]
    merged = qpeft.merge(adapted(model)).model
    for layer in quant_linears(merged).values():
        assert isinstance(layer, OutlierLinear)
        assert (layer.threshold, layer.compute, layer.training) == (4.5, "int8", False)
