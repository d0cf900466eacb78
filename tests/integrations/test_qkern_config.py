"""Quantizing while transformers loads a model: what `qkern.quantize` does, under all names it is asked by."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

import qkern
from qkern.demo import CALIBRATION, MODEL
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.integrations.hf_methods import QkernConfig, disable
from qkern.integrations.hf_quantizer import LoadTimeQuantizer
from qkern.nn import quant_linears

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
TEXTS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
Q_PROJ = "model.layers.0.self_attn.q_proj"
RTN: dict[str, Any] = {"method": "rtn"}
GPTQ: dict[str, Any] = {"method": "gptq", "calibration": TEXTS}
LISTED: dict[str, Any] = {"method": "gptq", "calibration": TEXTS.tolist()}  # texts are drawn from a list
DESC_ACT: dict[str, Any] = {**GPTQ, "act_order": "desc_act"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def from_pretrained(*arguments: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(*arguments, **options)


LOAD_TIME: list[tuple[str, str | None, dict[str, Any]]] = [
    ("llama", "w4g32", RTN),
    ("llama", "w3g32z", {**RTN, "search": "mse", "skip": ["o_proj"]}),
    ("llama", "nf4g32", RTN),
    ("llama", None, {**RTN, "assignment": {"*.mlp.*": "w2g32", "q_proj": "w8"}}),
    ("llama", "w8", {**RTN, "include": "lm_head"}),
    ("gpt2", "w4g32", RTN),
    ("phi3", "w8a8", RTN),
    ("qwen2", "w4g32", DESC_ACT),
    ("llama", "w4g32z", {"method": "awq", "calibration": TEXTS}),
    ("llama", "w8a8", {"method": "smoothquant", "alpha": 0.5, "calibration": TEXTS, "activations": "static"}),
]


@pytest.mark.parametrize(
    ("kind", "scheme", "options"), LOAD_TIME, ids=[f"{case[0]}-{case[1]}" for case in LOAD_TIME]
)
def test_quantizing_on_loading_is_quantize(
    originals: Any, tmp_path: Path, kind: str, scheme: str | None, options: dict[str, Any]
) -> None:
    expected = qkern.quantize(originals(kind), scheme=scheme, **options)
    model = from_pretrained(originals(kind), quantization_config=QkernConfig(scheme, **options))
    mine, theirs = quant_linears(model), quant_linears(expected)
    assert mine.keys() == theirs.keys() != set()
    assert all(str(layer.scheme) == str(theirs[name].scheme) for name, layer in mine.items())
    assert torch.equal(logits(model), logits(expected))
    json.dumps(model.config.to_dict())  # as printing a config does
    model.save_pretrained(tmp_path / "saved")
    # bitsandbytes' own layers round otherwise: transformers keeps its class for these.
    for load in (qkern.load,) if scheme == "nf4g32" else (qkern.load, from_pretrained):
        assert torch.equal(logits(load(tmp_path / "saved")), logits(expected))


def test_weights_that_are_not_offered(originals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = qkern.quantize(originals("llama"), scheme="w4g32", search="mse", **RTN)
    asked = LoadTimeQuantizer.param_needs_quantization
    monkeypatch.setattr(
        LoadTimeQuantizer,
        "param_needs_quantization",
        lambda self, model, name, **options: "q_proj" not in name and asked(self, model, name, **options),
    )
    config = QkernConfig("w4g32", search="mse")
    assert torch.equal(
        logits(from_pretrained(originals("llama"), quantization_config=config)), logits(expected)
    )


def test_tied_head_stays(originals: Any) -> None:
    with pytest.raises(UnsupportedError, match="lm_head is tied to the input embedding"):
        from_pretrained(originals("qwen2"), quantization_config=QkernConfig("w8", include=["lm_head"]))


def test_report_and_texts(tmp_path: Path) -> None:
    config = QkernConfig(
        "w4g128", method="gptq", calibration=CALIBRATION, tokenizer=str(MODEL), samples=2, length=64
    )
    model = from_pretrained(MODEL, quantization_config=config)
    assert model.qkern_report.layers.keys() == quant_linears(model).keys()
    assert torch.isfinite(logits(model)).all()


def test_format_and_compute_of_a_config(originals: Any, tmp_path: Path) -> None:
    config = QkernConfig("w4g32", compute="float", format="compressed-tensors")
    model = from_pretrained(originals("llama"), quantization_config=config)
    assert {layer.compute for layer in quant_linears(model).values()} == {"float"}
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize(
    ("config", "scheme", "options"),
    [
        (lambda: QkernConfig(bits=4, group_size=32, sym=True), "w4g32", RTN),
        (lambda: QkernConfig(bits=3, group_size=-1, sym=False), "w3z", RTN),
        (lambda: QkernConfig(w_bit=4, q_group_size=32, zero_point=True, version="GEMM"), "w4g32z", RTN),
        (
            lambda: GPTQConfig(bits=4, group_size=32, desc_act=True, dataset=LISTED["calibration"]),
            "w4g32",
            {**LISTED, "damp": 0.1, "act_order": "desc_act"},
        ),
        (
            lambda: GPTQConfig(
                bits=8,
                group_size=32,
                sym=False,
                damp_percent=0.05,
                dataset=LISTED["calibration"],
                model_seqlen=8,
            ),
            "w8g32z",
            {**LISTED, "length": 8},
        ),
        (
            lambda: AwqConfig(
                bits=4, group_size=32, modules_to_not_convert=["o_proj"], dataset=LISTED["calibration"]
            ),
            "w4g32z",
            {**LISTED, "method": "awq", "skip": ["o_proj"]},
        ),
    ],
    ids=["bits", "channel", "autoawq", "GPTQConfig", "GPTQConfig-asymmetric", "AwqConfig"],
)
def test_familiar_names(originals: Any, config: Any, scheme: str, options: dict[str, Any]) -> None:
    expected = qkern.quantize(originals("llama"), scheme=scheme, **options)
    model = from_pretrained(originals("llama"), quantization_config=config())
    assert torch.equal(logits(model), logits(expected))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "w4g128", "bits": 4}, "bits and scheme say the same"),
    ({"group_size": 64}, "bits is missing"),
    ({"bits": 5}, "unsupported bits: got 5"),
    ({"bits": 4, "w_bit": 4}, "w_bit says the same as another argument"),
    ({"bits": 4, "sym": True, "zero_point": True}, "contradict each other"),
    ({"bits": 4, "true_sequential": False}, "true_sequential=False has no meaning here"),
    ({"bits": 4, "backend": "marlin"}, "backend='marlin' has no meaning here"),
    ({"bits": 4, "batch_size": 2, "fuse_max_seq_len": 8}, "batch_size, fuse_max_seq_len cannot be given"),
    ({"bits": 4, "desc_act": True}, "act_order .*for method 'gptq' alone"),
    ({"scheme": "w4g128", "output": "folder"}, "output cannot be given"),
    ({"scheme": "w4g128", "compute": "int4"}, "unknown compute: got 'int4'"),
    ({"scheme": "w4g128", "format": "marlin"}, "unknown checkpoint format: got 'marlin'"),
    ({"scheme": "w4g128", "method": "hqq"}, "unknown method 'hqq'"),
    ({"scheme": "w4g128", "method": "gptq"}, "calibration is missing: method gptq"),
    ({"scheme": "w4g128", "calibration": "text.txt"}, "calibration is given, which method rtn does not read"),
    ({"scheme": "w4g128", "method": "gptq", "dataset": "c4"}, "'c4' is what GPTQ's tools call"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_config(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QkernConfig(**arguments)


def test_bad_config_of_transformers(originals: Any) -> None:
    for config, message in (
        (GPTQConfig(bits=4), "calibration is missing: method gptq"),
        (GPTQConfig(bits=4, dataset=["a text"], batch_size=4), "batch_size cannot be given to qkern"),
        (AwqConfig(bits=4, dataset=["a text"], backend="marlin"), "backend=.* has no meaning here"),
    ):
        with pytest.raises(InputError, match=message):
            from_pretrained(originals("llama"), quantization_config=config)


def test_weights_that_cannot_be_quantized(originals: Any, rewrite: Any, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {f"{Q_PROJ}.weight": torch.full((64, 64), torch.nan).bfloat16()}

    folder = rewrite(originals("llama"), tmp_path / "spoilt", spoil)
    with pytest.raises(InputError, match=rf"{Q_PROJ}\.weight: .*NaN"):
        from_pretrained(folder, quantization_config=QkernConfig("w4g32"))
    folder = rewrite(
        originals("llama"),
        tmp_path / "less",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{Q_PROJ}.weight"},
    )
    with pytest.raises(FormatError, match=rf"missing: {Q_PROJ}\.weight"):
        from_pretrained(folder, quantization_config=QkernConfig("w4g32"))
    with pytest.raises(InputError, match="'nothing' in skip or include matches no linear"):
        from_pretrained(originals("llama"), quantization_config=QkernConfig("w4g32", skip=["nothing"]))


def test_qkern_config_in_a_file_is_refused(originals: Any, tmp_path: Path) -> None:
    shutil.copytree(originals("llama"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    described = {"quantization_config": QkernConfig("w4g32").to_dict()}
    file.write_text(json.dumps(json.loads(file.read_text()) | described))
    with pytest.raises(FormatError, match="a QkernConfig, which describes no checkpoint"):
        from_pretrained(tmp_path / "model")


def test_quantizing_needs_no_enabling(originals: Any) -> None:
    disable()
    assert quant_linears(from_pretrained(originals("llama"), quantization_config=qkern.QkernConfig("w8")))
