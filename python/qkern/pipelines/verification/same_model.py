"""Whether two configurations describe models that compute the same: files say one thing in many ways."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qkern.pipelines.verification.report import Findings

__all__ = ["compare_models"]

# Fields of files; those of which the windows and rotations of `_fields` say what they come to; and that the
# head is tied, which a quantized one is not any more.
_NOT_COMPARED: Final = re.compile(
    r"_.*|architectures|.*dtype|transformers_version|quantization_config|name_or_path|use_cache|return_dict"
    r"|tie_word_embeddings|rope_parameters|rope_scaling|rope_theta|use_sliding_window|max_window_layers"
)
# Training and generation: the forward pass has no use for them.
_NOTED: Final = re.compile(
    r"init.*|.*dropout|.*_pdrop|layerdrop|summary_.*|.*_token_ids?|output_.*|pretraining_tp|id2label|label2id"
    r"|problem_type|router_aux_loss_coef|router_jitter_noise|max_position_embeddings|n_positions"
)
# llama.cpp attends to everything, which an export warns of.
_WINDOWS: Final = ("sliding_window", "layer_types")
# A Mistral is a Llama with a window.
_SAME_TYPE: Final = {"mistral": "llama"}
_LONG: Final = "rope_parameters.long_factor"
# Of fp32, in which a GGUF has numbers, after the powers and products that frequencies are.
_TOLERANCE: Final = 1e-5


def compare_models(found: Any, original: Any, findings: Findings, *, is_gguf: bool = False) -> None:
    """Enter what a model under verification computes otherwise than the original by its configuration.

    Parameters
    ----------
    found, original : PreTrainedModel
        Without weights.
    findings : Findings
        Takes what one of them says alone, or what the forward pass does not read, as a note.
    is_gguf : bool
        Whether a GGUF says what `found` is.
    """
    where = "the file" if is_gguf else "config.json"
    ours, theirs = (_fields(model) for model in (found, original))
    problems, noted = [], []
    for key in sorted(ours.keys() | theirs.keys()):
        if _agree(ours.get(key), theirs.get(key)):
            continue
        alone = key not in ours or key not in theirs
        if alone or _NOTED.fullmatch(key) or (is_gguf and key in _WINDOWS):
            # A set of factors for long texts alone is what a GGUF's only set becomes.
            noted += [] if alone and key == _LONG else [key]
        else:
            problems.append(f"{where} says {key} {ours[key]!r:.80}: the original's {theirs[key]!r:.80}")
    findings.add("original", *problems)
    if noted:
        findings.note("original", f"{where} and the original's configuration differ in {', '.join(noted)}")


def _fields(model: Any) -> dict[str, Any]:
    """Fields of a configuration, windows and rotations as they are computed."""
    config = model.config.get_text_config(decoder=True).to_dict()
    fields = {key: value for key, value in config.items() if not _NOT_COMPARED.fullmatch(key)}
    if fields.get("head_dim", 0) is None:
        del fields["head_dim"]  # what the shapes say
    kind = model.config.get_text_config(decoder=True).model_type
    fields["model_type"] = _SAME_TYPE.get(kind, kind)
    uses_window = config.get("use_sliding_window", True)
    fields["sliding_window"] = config.get("sliding_window") if uses_window else None
    return fields | dict(_rotations(model))


def _rotations(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the frequencies and scalings of rotary embeddings, and the factors that long texts change to."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and not buffer.is_meta:
            yield name, buffer.tolist()
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("attention_scaling"):
                yield f"{name}.{key}", value
    rope = model.config.get_text_config(decoder=True).to_dict().get("rope_parameters") or {}
    if "long_factor" in rope:
        yield _LONG, rope["long_factor"]


def _agree(found: Any, original: Any) -> bool:
    """Whether two values are one: a GGUF has fp32 numbers."""
    if isinstance(found, dict) and isinstance(original, dict):
        return all(_agree(found.get(key), original.get(key)) for key in found.keys() | original.keys())
    if isinstance(found, list | tuple) and isinstance(original, list | tuple):
        return len(found) == len(original) and all(map(_agree, found, original))
    if isinstance(found, int | float) and isinstance(original, int | float):
        return math.isclose(found, original, rel_tol=_TOLERANCE)
    return bool(found == original)
