"""LoRA over quantized linears: what is refused, and what is left to PEFT."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import qkern
from qkern.errors import InputError, UnsupportedError
from qkern.integrations import peft as qpeft
from qkern.nn import QuantEmbedding, TiedHead

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def fresh(tiny: Callable[..., Any]) -> Callable[[], Any]:
    """Maker of a quantized model without adapters."""

    def make() -> Any:
        model = tiny("llama")
        qkern.replace_linears(model, "w4g32z")
        return model

    return make


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported over QuantLinear"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"modules_to_save": ["o_proj"]}, r"modules_to_save .* model.layers.0.self_attn.o_proj"),
        ({"modules_to_save": ["mlp"]}, r"modules_to_save .* model.layers.0.mlp, model.layers.1.mlp;"),
    ],
)
def test_what_codes_do_not_support_is_refused_by_name(
    fresh: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        get_peft_model(fresh(), config(**options))


def test_modules_without_codes_are_trained_whole(fresh: Callable[..., Any]) -> None:
    model = get_peft_model(fresh(), config(modules_to_save=["lm_head", "embed_tokens"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trained) == 2
    model = fresh()
    model.model.embed_tokens = QuantEmbedding.from_embedding(model.model.embed_tokens, "w4g32")
    with pytest.raises(UnsupportedError, match=r"modules_to_save .* model\.embed_tokens;"):
        get_peft_model(model, config(modules_to_save=["embed_tokens"]))


def test_other_models_are_left_to_peft(tiny: Callable[..., Any]) -> None:
    model = get_peft_model(tiny("llama"), config(init_lora_weights="olora", modules_to_save=["lm_head"]))
    assert not any(isinstance(module, qpeft.LoraQuantLinear) for module in model.modules())
    assert qpeft.merge(model).layers == {}


def test_merge_uses_a_model_up(fresh: Callable[..., Any]) -> None:
    model = get_peft_model(fresh(), config())
    assert qpeft.merge(model).layers
    with pytest.raises(InputError, match=r"no adapter layers left: .* load the base and the adapter again"):
        qpeft.merge(model, dtype=torch.bfloat16)


def test_merge_refuses_what_it_cannot_merge(fresh: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="takes a PeftModel with LoRA adapters: got LlamaForCausalLM"):
        qpeft.merge(fresh())
    with pytest.raises(InputError, match="no adapters other: allowed are default"):
        qpeft.merge(get_peft_model(fresh(), config()), adapter_names=["other"])
    with pytest.raises(InputError, match=r"dtype must be fp32, fp16, bf16 or None: got torch\.float64"):
        qpeft.merge(get_peft_model(fresh(), config()), dtype=torch.float64)
    model = fresh()
    model.model.embed_tokens = QuantEmbedding.from_embedding(model.model.embed_tokens, "w4g32")
    model.lm_head = TiedHead(model.model.embed_tokens)
    with pytest.raises(UnsupportedError, match="quantized embedding is not decoded"):
        qpeft.merge(get_peft_model(model, config()), dtype=torch.float32)


def test_verbs_refuse_a_model_with_adapters(fresh: Callable[..., Any], tmp_path: Path) -> None:
    model = get_peft_model(fresh(), config())
    native = fresh()
    native.add_adapter(config())
    verbs = (
        lambda model: qkern.save(model, tmp_path / "never"),
        lambda model: qkern.quantize(model, method="rtn"),
        lambda model: qkern.prepare_qat(model, "w4g32z", learn_scales=True),
        qkern.convert_qat,
    )
    for verb in verbs:
        with pytest.raises(InputError, match=r"adapters of PEFT \(default\): merge them first"):
            verb(model)
        with pytest.raises(InputError, match=r"adapters of PEFT \(default\)"):
            verb(native)
    assert not (tmp_path / "never").exists()


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "qkern.integrations.peft")
    with pytest.raises(ImportError, match=r"need PEFT 0.21 or later: pip install 'peft>=0.21'"):
        importlib.import_module("qkern.integrations.peft")
