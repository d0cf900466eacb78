"""The verb `verify`: a result read independently, compared with what runs and with what it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from qkern.calibration import bounded_length, has_tokenizer, load_config, load_tokenizer, meta_model
from qkern.checkpoints import model_folder, read_json
from qkern.errors import InputError, QkernError, reason_of
from qkern.evaluation import bos_if_added, kl_divergence, read_text, token_ids, window_logits
from qkern.evaluation.decoding import TransformersDecoder
from qkern.models import column_weight, describe
from qkern.nn import compute_mode, named_linears, unfuse_experts
from qkern.nn.linear import is_conv1d
from qkern.nn.state import QuantModule
from qkern.pipelines.load import is_gguf, load
from qkern.pipelines.outcomes import runtime_refusals, split_groups
from qkern.pipelines.source import open_source
from qkern.pipelines.verification.companions import compare_tokenizers
from qkern.pipelines.verification.folder import LEGACY, FolderSubject
from qkern.pipelines.verification.gguf_file import GGUFSubject, original_tensors
from qkern.pipelines.verification.original import Comparison
from qkern.pipelines.verification.report import CHECKS, Check, Findings, Verification
from qkern.pipelines.verification.same_model import compare_models
from qkern.search import runtime_named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qkern.search import Runtime

__all__ = ["CHECKS", "Check", "Verification", "verify"]

Subject: TypeAlias = FolderSubject | GGUFSubject

_PROMPT: Final = 8
# Vocabularies begin with special tokens, padding among them.
_FIRST: Final = 3
_NEW_TOKENS: Final = 8
_LEAST: Final = 2
_OF_MODEL: Final = ("weights", "generation", "kl")
_OF_ORIGINAL: Final = ("original", "error", "kl")


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    runtime: str | None = None,
    tokens: int = 2048,
    window: int = 512,
    max_kl: float = 2.0,
) -> Verification:
    """Check a quantized model as a runtime finds it on the disk.

    Every tensor, and what the configuration says of it, is read again by readers that share no code with
    those that wrote it (of a GGUF by the gguf package's own dequantizers). The checks are those of `CHECKS`;
    a failed one does not stop the others, and what `qkern.load` reads right but others may not is a note.
    What is damaged consistently, such as nibbles in another order, zero points off by one where the grid is
    asymmetric, scales of other rows, or bits of a GGUF's codes, only shows beside the original. The loaded
    model, fp32 where it is not quantized, is in memory, and for the KL the original in fp32 too.

    Parameters
    ----------
    path : str or Path
        Folder in GPTQ (v1, v2), AWQ, compressed-tensors, bitsandbytes or 16 bits, hub id, or GGUF file.
    against : str or Path, optional
        The 16-bit original, a folder or hub id.
    text : str or Path, optional
        UTF-8 file of held-out text for the KL; None: no KL.
    runtime : {"torch", "vllm", "gguf"}, optional
        Whose rules must hold; default: torch, of a GGUF gguf.
    tokens : int
        How many of the text's tokens are scored.
    window : int
        Tokens of a window, at most `tokens` and what the model reads.
    max_kl : float
        Largest mean KL(original || model) in nats; rounding to nearest at 2 bits may take about 1.

    Returns
    -------
    Verification
        `Verification.is_sound` if no check failed.

    Raises
    ------
    InputError
        On an argument that cannot be, or if there is nothing at the path, no original or text where they are
        named, or a quantized original.
    FormatError
        If the original has no config.json that is read.
    UnsupportedError
        If the model is in a format that is not read here, such as fp8.
    """
    if not max_kl > 0 or min(tokens, window) < _LEAST:
        raise InputError(
            f"max_kl must be above 0, tokens and window {_LEAST} or more: got {max_kl}, {tokens} and {window}"
        )
    window = min(window, tokens)
    content = None if text is None else read_text(text)
    original = None if against is None else _whole_original(against)
    findings = Findings()
    subject: Subject = GGUFSubject(Path(path), findings) if is_gguf(path) else FolderSubject(path, findings)
    wanted = runtime_named(runtime or subject.runtime)
    model = _loaded(path, subject, findings)
    if model is not None:
        _check_generation(model, findings)
        _check_weights(model, subject, findings)
    _check_runtime(subject, wanted, findings)
    errors: dict[str, float] = {}
    if original is None:
        findings.skip(_OF_ORIGINAL, "no original was given (--against)")
    elif findings.has("files", "tensors"):
        findings.skip(_OF_ORIGINAL, "tensors are damaged or missing")
    else:
        errors = _check_original(original, subject, findings)
        if findings.has("error"):
            findings.note(
                "error",
                "what was trained since (QAT, a merged adapter) is not the original's: leave it out for that",
            )
        _check_kl(original, model, content, findings, tokens=tokens, window=window, max_kl=max_kl)
    return Verification(
        path=str(path),
        format=subject.format,
        runtime=wanted.name,
        against=None if against is None else str(against),
        checks=findings.checks(),
        errors=errors,
    )


def _whole_original(against: str | Path) -> Path:
    """Folder of the original, which must be 16-bit."""
    if is_gguf(against):
        raise InputError(f"the original must be a 16-bit folder or hub id: got the GGUF file {against}")
    folder = model_folder(against)
    said = read_json(folder / "config.json").get("quantization_config")
    if said or any((folder / file).exists() for file in LEGACY):
        raise InputError(
            f"the original must be a 16-bit folder or hub id: {against} is quantized; give what the model "
            "was quantized from, or leave it out"
        )
    return folder


# The model as it runs ------------------------------------------------------------------------------------


def _loaded(path: str | Path, subject: Subject, findings: Findings) -> Any:
    """Load the model as everyone does, its experts as linears; None if that is refused."""
    if subject.why_not_loaded is not None:
        findings.skip(_OF_MODEL, subject.why_not_loaded)
        return None
    try:
        model = load(path, dtype=torch.float32)
    except QkernError as error:
        findings.add("weights", f"qkern.load refuses the model: {error}")
        findings.skip(_OF_MODEL, "the model is not loaded")
        return None
    unfuse_experts(model)
    return model


def _check_generation(model: Any, findings: Findings) -> None:
    """Let the model go on by itself, in float arithmetic where its scheme says nothing else."""
    decoder = TransformersDecoder(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    try:
        with compute_mode(model, None):
            logits = decoder.prefill(torch.arange(_FIRST, _FIRST + _PROMPT, device="cpu") % vocabulary)
            for token in range(_NEW_TOKENS):
                if not bool(logits.isfinite().all()):
                    findings.add("generation", f"logits are NaN or Inf after {_PROMPT + token} tokens")
                    return
                findings.count("generation")
                logits = decoder.step(int(logits.argmax()))
    except Exception as error:  # the forward is transformers', by a configuration that may be wrong
        findings.add("generation", f"the model does not run: {type(error).__name__}: {reason_of(error)}")
        findings.skip(("kl",), "the model does not run")


def _check_weights(model: Any, subject: Subject, findings: Findings) -> None:
    """Compare the loaded model, whose layers are packed for the kernels by now, with what was read here."""
    for name, expected in subject.in_model():
        module, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(module)
        except AttributeError:
            findings.add("weights", f"{name} is in the file, but not in the loaded model")
            continue
        found = (
            owner.dequantize()
            if isinstance(owner, QuantModule) and leaf == "weight"
            else getattr(owner, leaf)
        )
        findings.count("weights")
        if found.shape != expected.shape or not torch.equal(found.float(), expected):
            findings.add("weights", f"{name} is not what the file says: {_difference(found, expected)}")


def _difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"{list(found.shape)} instead of {list(expected.shape)}"
    differing = found.float() != expected
    return f"{int(differing.sum())} of {expected.numel()} weights differ"


# The runtime ---------------------------------------------------------------------------------------------


def _check_runtime(subject: Subject, runtime: Runtime, findings: Findings) -> None:
    choices = subject.choices
    shapes = {name: subject.shape(name) for name in choices}
    findings.count("runtime", len(choices))
    if not choices:
        findings.skip(("runtime",), "there is no quantized layer that can be read")
    findings.add("runtime", *runtime_refusals(runtime, choices, shapes, subject.format or ""))
    if isinstance(subject, FolderSubject) and subject.model is not None:
        linears: dict[str, tuple[int, int]] = {}
        for name, linear in named_linears(subject.model).items():
            N, K = column_weight(linear).shape
            linears[name] = N, K
        findings.add("runtime", *split_groups(runtime, describe(subject.model), choices, linears))


# The original --------------------------------------------------------------------------------------------


def _check_original(folder: Path, subject: Subject, findings: Findings) -> dict[str, float]:
    """Compare names, shapes and values; return the error of every matrix."""
    try:
        if isinstance(subject, GGUFSubject):
            return _compare_gguf(folder, subject, findings)
        return _compare_folder(folder, subject, findings)
    except QkernError as error:
        findings.add("original", f"the original cannot be compared with: {error}")
        findings.skip(("error",), "the original cannot be compared with")
        return {}


def _compare_folder(folder: Path, subject: FolderSubject, findings: Findings) -> dict[str, float]:
    source = open_source(folder)
    structure = describe(source.model)
    matrices = dict.fromkeys(subject.matrices)
    state = source.model.state_dict(keep_vars=True)
    plain = subject.plain
    known = {*plain, *(f"{linear}.weight" for linear in subject.choices)}
    _compare_names(
        {name for name in source.weights.names if name in state}, set(source.stored_once()), known, findings
    )
    if subject.model is not None:
        compare_models(subject.model, source.model, findings)
    compare_tokenizers(subject.tokenizer, folder, findings, is_there=has_tokenizer(subject.folder))

    def original(name: str) -> Tensor:
        module = source.model.get_submodule(name.rpartition(".")[0])
        weight = source.weights.get(name)
        return weight.t() if name.removesuffix(".weight") in matrices and is_conv1d(module) else weight

    offset = 0.0 if structure.architecture is None else structure.architecture.norm_offset
    comparison = Comparison(source.model, original, plain, subject.matrix, norm_offset=offset)
    shared = [linear for linear in matrices if f"{linear}.weight" in source.weights]
    errors = _compare_matrices(comparison, {linear: linear for linear in shared}, original, subject, findings)
    # Tied tensors are compared once, and not again what was decoded.
    done = {id(state[f"{linear}.weight"]) for linear in shared}
    first = {
        id(state[name]): name
        for name in reversed(list(plain))
        if name in source.weights and name in state and id(state[name]) not in done
    }
    _compare_plain(comparison, list(first.values()), findings)
    return errors


def _compare_gguf(folder: Path, subject: GGUFSubject, findings: Findings) -> dict[str, float]:
    planned = original_tensors(folder)
    matrices = {
        planned[name].source.removesuffix(".weight"): name for name in subject.matrices if name in planned
    }
    plain = {planned[name].source: _as_matrix(v) for name, v in subject.plain.items() if name in planned}
    by_source = {tensor.source: tensor for tensor in planned.values()}
    _compare_names(set(planned), set(planned), {*subject.matrices, *subject.plain}, findings)

    def original(name: str) -> Tensor:
        values = by_source[name].read()
        assert isinstance(values, Tensor)
        return _as_matrix(values)

    model = meta_model(load_config(folder))
    if subject.model is not None:
        compare_models(subject.model, model, findings, is_gguf=True)
    compare_tokenizers(subject.tokenizer, folder, findings, is_there=False)
    # The norms of a file are what is multiplied by.
    comparison = Comparison(
        model,
        original,
        plain,
        lambda linear: subject.matrix(matrices[linear]),
        norm_offset=0.0,
    )
    errors = _compare_matrices(comparison, matrices, original, subject, findings)
    _compare_plain(comparison, list(plain), findings)
    return errors


def _as_matrix(values: Tensor) -> Tensor:
    """Put experts one below the other."""
    return values.flatten(0, -2) if values.dim() > 2 else values


def _compare_names(allowed: set[str], needed: set[str], found: set[str], findings: Findings) -> None:
    findings.count("original", len(found))
    findings.add("original", *(f"{name} of the original is missing" for name in sorted(needed - found)))
    findings.add("original", *(f"{name} is not in the original" for name in sorted(found - allowed)))


def _compare_matrices(
    comparison: Comparison,
    matrices: Mapping[str, str],
    original: Callable[[str], Tensor],
    subject: Subject,
    findings: Findings,
) -> dict[str, float]:
    """Compare matrices, from names in the model to those in the file; return their errors."""
    errors = {}
    for linear, name in matrices.items():
        shape, wanted = subject.shape(name), tuple(original(f"{linear}.weight").shape)
        if shape != wanted:
            findings.add("original", f"{name} is {list(shape)}: the original's is {list(wanted)}")
            continue
        errors[name], problems = comparison.compare(linear)
        findings.count("error")
        findings.add("error", *(f"{name}: {problem}" for problem in problems))
    return errors


def _compare_plain(comparison: Comparison, names: list[str], findings: Findings) -> None:
    problems = [comparison.plain_problem(name) for name in names]
    findings.add("original", *(problem for problem in problems if problem is not None))


def _check_kl(
    folder: Path,
    model: nn.Module | None,
    content: str | None,
    findings: Findings,
    *,
    tokens: int,
    window: int,
    max_kl: float,
) -> None:
    if content is None or model is None or findings.has("generation"):
        findings.skip(("kl",), "no text was given (--text)" if content is None else "the model does not run")
        return
    try:
        tokenizer = load_tokenizer(folder)
        ids = token_ids(tokenizer, content)[:tokens]
        settings: dict[str, Any] = {
            "window": bounded_length(load_config(folder), window),
            "bos": bos_if_added(tokenizer),
        }
        reference = window_logits(load(folder, dtype=torch.float32), ids, **settings)
        values = kl_divergence(reference, model, ids, allow_short=True, **settings)
    except QkernError as error:
        findings.add("kl", f"the KL cannot be measured: {error}")
        return
    mean = float(values.mean())
    findings.count("kl", len(values))
    findings.measured("kl", mean)
    if mean > max_kl:
        findings.add("kl", f"KL(original || model) is {mean:.3f} nats a token: allowed is {max_kl:g}")
