"""The verb `quantize`: checks first, then layer by layer, then all of the output or nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from qkern import __version__, _progress
from qkern.calibration import LayerStream, calibration_hash, fill
from qkern.checkpoints import (
    CheckpointWriter,
    TensorFolder,
    bitsandbytes_details,
    check_output,
    format_named,
    parse_size,
)
from qkern.errors import FormatError, InputError, OutputError, UnsupportedError
from qkern.models import Structure, describe, known_architectures
from qkern.nn import QuantLinear
from qkern.pipelines.calibration import calibration_ids
from qkern.pipelines.checks import (
    Targets,
    checked_format,
    checked_settings,
    find_targets,
    target_names,
)
from qkern.pipelines.layerwise import Finished, LayerRecord, Settings, quantize_head, quantize_layer
from qkern.pipelines.load import mark_quantized, save_as_quantized, usable_device
from qkern.pipelines.partial import Partial, partial_folder
from qkern.pipelines.recipe import QuantizationReport, recipe_layers
from qkern.pipelines.source import Source, open_source
from qkern.search import MixedPrecision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qkern.calibration import Weights
    from qkern.quantizers.gptq import ActOrder
    from qkern.schemes import Scheme

__all__ = ["quantize", "run_key"]

logger = logging.getLogger(__name__)

_HEAD_FILE: Final = "head"


def quantize(
    model: Any,
    *,
    method: str = "gptq",
    scheme: Scheme | str | None = None,
    assignment: MixedPrecision | Mapping[str, Any] | str | Path | None = None,
    calibration: Any = None,
    output: str | Path | None = None,
    format: str | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    damp: float = 0.05,
    act_order: ActOrder = "group-aware",
    static_groups: bool = False,
    block_size: int = 128,
    search: str | None = None,
    scale_only: bool = False,
    alpha: float | str | None = None,
    activations: str = "dynamic",
    observer: str | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    max_shard_size: int | str = "5GB",
    resume: bool = True,
) -> Any:
    """Quantize the linear layers of a causal LM, one decoder layer at a time.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        Folder with config.json and safetensors, hub id, or a model in memory, which is not modified.
    method : {"gptq", "awq", "rtn", "smoothquant"}
        ``"rtn"`` needs no calibration, unless `activations` are static. ``"smoothquant"`` moves range from
        int8 activations to the weights that read them, then rounds these to nearest.
    scheme : Scheme or str, optional
        Default: w4g128, for AWQ w4g128z, for SmoothQuant w8a8.
    assignment : MixedPrecision, mapping, str or Path, optional
        Scheme of every linear instead of one for all, or the JSON file that holds it; linears that it does
        not name stay 16-bit.
    calibration : optional
        Source of texts as in `qkern.calibration.load_texts`, or token ids int64 ``[S, T]``.
    output : str or Path, optional
        Folder to write, which must not exist or be empty, and not lie in the model's. None: the model is
        returned.
    format : str, optional
        ``gptq``, ``gptq_v2``, ``awq``, ``compressed-tensors`` or ``bitsandbytes``; default: see
        `default_format`.
    skip : sequence of str, or str
        Linears that stay 16-bit: names, ends of names, or globs, of them or of modules around them
        (``"experts"``). Experts of which qkern makes no linears (`unfuse_experts`) must be named here.
    include : sequence of str, or str
        Linears to quantize that stay 16-bit otherwise: ``"lm_head"`` and routers.
    samples, length, seed : int
        Calibration sequences, tokens in each (at most what the model takes), seed of the draw.
    damp, act_order, static_groups, block_size
        GPTQ's, see `qkern.quantizers.GPTQConfig`.
    search : str, optional
        How scales are chosen: ``"minmax"`` (default for RTN and AWQ), ``"mse"``, for GPTQ its own loss,
        ``"loss"`` (its default; about twice the time of the others), or for nf4 and fp4 as bitsandbytes does,
        ``"absmax"`` (their default). ``"mse"`` and ``"loss"`` may give a symmetric group a negative scale,
        which every format stores and every reader multiplies by.
    scale_only : bool
        AWQ: fold the scales and write (or return) the 16-bit model.
    alpha : float or str, optional
        SmoothQuant's share of the range that the weights take over, 0 to 1; ``"auto"`` (its default) finds
        the best for each group of linears that share an input. With method ``"gptq"`` the model is smoothed
        first.
    activations : {"dynamic", "static"}
        Of schemes with ``a8``: a scale for each token as it comes, or one for all, found on the calibration
        texts (``w8a8`` alone).
    observer : {"minmax", "percentile", "mse"}, optional
        How static scales are chosen, see `qkern.quantizers.ActivationRange`; default ``"mse"``.
    tokenizer : tokenizer, str or Path, optional
        For calibration texts, when `model` is in memory: a tokenizer, or the folder or hub id of one.
    device : str
        Where layers are computed: ``"auto"`` (CUDA if there is one, else CPU) or a torch device.
    max_shard_size : int or str
        Of the written safetensors.
    resume : bool
        Go on from ``<output>.partial`` where an earlier run of the same arguments stopped.

    Returns
    -------
    PreTrainedModel or QuantizationReport
        Without `output` the model, its linears replaced by `QuantLinear` (and ``qkern_report`` set);
        else the report.

    Raises
    ------
    InputError
        On arguments, texts or weights that cannot be used; nothing is written.
    FormatError
        If the model's files are damaged.
    UnsupportedError
        If the format cannot hold a layer, before any work; on experts of which no linears can be made; or on
        `scale_only` or SmoothQuant for an architecture without data. Only whether a zero point is 0, which
        GPTQ v1 cannot store, is known at the end: finished layers are then kept for the same call with
        ``format="gptq_v2"``.
    QkernError
        If the disk is full; finished layers are kept in ``<output>.partial``.
    """
    started = time.monotonic()
    # A lone string is a sequence of strings too, of its letters.
    skip, include = ((names,) if isinstance(names, str) else names for names in (skip, include))
    mixed = None if assignment is None else MixedPrecision.of(assignment)
    settings = checked_settings(
        method,
        scheme,
        damp,
        act_order,
        static_groups,
        block_size,
        search,
        scale_only,
        mixed,
        alpha=alpha,
        activations=activations,
        observer=observer,
    )
    parse_size(max_shard_size)
    read_from = model if isinstance(model, (str, Path)) else getattr(model, "name_or_path", None)
    folder = None if output is None else check_output(output, source=read_from)
    if format is not None:
        format_named(format)
        if folder is None or scale_only:
            raise InputError(f"format {format!r} needs an output folder and quantized weights: drop format")
    target_device = usable_device(device)
    source = open_source(model)
    structure = describe(source.model)
    if settings.folds and structure.architecture is None:
        _say_no_folding(source.model.config.model_type, settings)
    settings, targets = find_targets(source.model, structure, settings, mixed, skip, include)
    if folder is not None and not scale_only:
        format = checked_format(source.model, structure, targets, settings, format)
    _refuse_nonfinite(source, set(target_names(structure, targets)))
    ids = None
    if not settings.reads_text and calibration is not None:
        logger.warning("method rtn does not use the calibration texts: they are not read")
    if settings.reads_text:
        ids = calibration_ids(source, calibration, tokenizer, samples, length, seed)
    arguments: dict[str, Any] = {
        "method": method,
        "scheme": settings.spelling,
        "skip": list(skip),
        "include": list(include),
        "search": settings.gptq.search if method == "gptq" else settings.search,
        "device": target_device.type,
    }
    if method == "gptq":
        arguments |= {
            "damp": damp,
            "act_order": act_order,
            "static_groups": static_groups,
            "block_size": block_size,
        }
    if scale_only:
        arguments["scale_only"] = True
    for name in ("alpha", "observer"):
        if getattr(settings, name) is not None:
            arguments[name] = getattr(settings, name)
    if mixed is not None:
        arguments["assignment"] = dict(mixed.choices)
    facts: dict[str, Any] = {
        "source": source.name,
        "arguments": arguments,
        "calibration": None,
    }
    if ids is not None:
        facts["calibration"] = {"shape": list(ids.shape), "seed": seed, "sha256": calibration_hash(ids)}
    run = _Run(source, structure, targets, settings, ids, target_device)
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    summing = _Summing(settings, targets, facts, started, parameters)
    if folder is None:
        layers = list(run.layers(None))
        for finished in layers:
            summing.add(finished)
        result = _assemble(source, layers)
        result.qkern_report = summing.report()
        return result
    with Partial(partial_folder(folder), run_key(source, facts), resume=resume) as partial:
        with _keeping(partial):
            for _ in run.layers(partial):
                pass
        try:
            with CheckpointWriter(
                folder, format=format, max_shard_size=max_shard_size, naming=source.stored_name
            ) as writer:
                with _keeping(partial):
                    _write_tensors(writer, source, partial, run.names(), summing)
                report = summing.report(folder, format)
                _finish(writer, source, targets, settings, report, tokenizer)
        except OutputError as error:
            raise OutputError(f"{error}{partial.kept()}") from error
        partial.remove()
    return report


@contextmanager
def _keeping(partial: Partial) -> Iterator[None]:
    """On an error, keep the finished layers only if a later run can use them."""
    try:
        yield
    except (InputError, FormatError):
        # The model has to change, so nothing that was made from it is of use.
        partial.remove()
        raise
    except BaseException as error:
        if partial.count == 0:
            partial.remove()
        elif isinstance(error, KeyboardInterrupt):
            logger.warning("interrupted%s", partial.kept())
        raise


def _refuse_nonfinite(source: Source, quantized: set[str]) -> None:
    """Read what is copied as it is: a NaN in it would come to light only when the output is written."""
    for name in source.stored_once():
        if name.removesuffix(".weight") not in quantized:
            source.weights.get(name)


def _say_no_folding(model_type: str, settings: Settings) -> None:
    if settings.scale_only or settings.alpha is not None:
        what = "scale_only folds AWQ's scales" if settings.scale_only else "SmoothQuant folds scales"
        raise UnsupportedError(
            f"{what}, and qkern has no data for the architecture {model_type} to fold them by; known are "
            f"{', '.join(known_architectures())}"
        )
    logger.warning(
        "qkern has no data for the architecture %s: AWQ's scales are skipped (norm to linears, linear to "
        "linear), only its clipping is applied",
        model_type,
    )


def run_key(source: Source, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that the layers depend on."""
    config = json.dumps(source.config, sort_keys=True, default=str)
    return {
        "qkern": __version__,
        "torch": torch.__version__,
        "weights": source.identity(),
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "arguments": facts["arguments"],
        "calibration": facts["calibration"],
    }


@dataclass(frozen=True, slots=True)
class _Run:
    """The walk over the layers."""

    source: Source
    structure: Structure
    targets: Targets
    settings: Settings
    ids: Tensor | None
    device: torch.device

    def names(self) -> list[str]:
        """Names under which the finished layers are kept."""
        names = [f"layer-{index:05}" for index in range(self.structure.count)]
        return names + [_HEAD_FILE] * self.targets.head

    @torch.no_grad()
    def layers(self, partial: Partial | None) -> Iterator[Finished]:
        """Yield each finished layer in order, from `partial` where it is there, into it where it is not."""
        structure, settings = self.structure, self.settings
        stream = LayerStream(
            self.source.model, structure.layers, self.source.weights, head=structure.head, device=self.device
        )
        done = 0 if partial is None else partial.count
        if partial is not None and done:
            logger.info("going on after %d finished layers in %s", done, partial.folder)
        total = structure.count + self.targets.head
        if self.ids is not None and done < total:
            stream.embed(self.ids)
        with _progress.task(f"{settings.method} {settings.spelling}", total=total, unit="layer") as progress:
            for index in range(structure.count):
                name = self.names()[index]
                finished = None if partial is None else partial.load(name)
                found = finished is not None
                # A finished layer is run only when a later one needs its outputs.
                runs = self.ids is not None and done < total
                started = time.monotonic()
                with stream.layer(index) if runs or not found else nullcontext() as layer:
                    if finished is None:
                        finished = quantize_layer(
                            stream, structure, index, self.targets.layers[index], settings
                        )
                    elif layer is not None:
                        finished.put_into(layer, stream.prefix(index))
                    if runs and index + 1 < total:
                        stream.advance(index)
                if partial is not None and not found:
                    partial.save(name, finished)
                progress.advance(note=_summary(finished))
                if not found:
                    _log_layer(index, structure.count, finished, time.monotonic() - started)
                yield finished
            if self.targets.head and structure.head is not None:
                finished = None if partial is None else partial.load(_HEAD_FILE)
                if finished is None:
                    finished = quantize_head(stream, structure.head, settings)
                    if partial is not None:
                        partial.save(_HEAD_FILE, finished)
                progress.advance(note=_summary(finished))
                yield finished


def _summary(finished: Finished) -> str:
    errors = [record.error for record in finished.records.values()]
    return f"error {sum(errors) / len(errors):.2e}" if errors else "nothing quantized"


def _log_layer(index: int, count: int, finished: Finished, seconds: float) -> None:
    records = finished.records
    if not records:
        return
    worst = max(records, key=lambda name: records[name].error)
    logger.info(
        "layer %d of %d: mean %s, worst %.2e (%s), %.1f s",
        index + 1,
        count,
        _summary(finished),
        records[worst].error,
        worst,
        seconds,
    )


def _assemble(source: Source, layers: Sequence[Finished]) -> Any:
    """Put the results into the model without weights and fill in the rest from the source."""
    model, weights = source.model, source.weights
    changed = {name: tensor for finished in layers for name, tensor in finished.tensors.items()}
    for finished in layers:
        for name, quantized in finished.weights.items():
            bias = _bias(name, finished, weights)
            model.set_submodule(name, QuantLinear.from_quantized(quantized, bias, source.dtype))
            changed.pop(f"{name}.bias", None)
    for name, tensor in changed.items():
        owner, _, leaf = name.rpartition(".")
        value = tensor.to(source.dtype or tensor.dtype)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    fill(model, weights, dtype=source.dtype, copied=isinstance(weights.tensors, TensorFolder))
    model.config.dtype = source.dtype or weights.get(source.stored_once()[0]).dtype
    if source.folder is not None and (source.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    if any(finished.weights for finished in layers):
        save_as_quantized(model)
        mark_quantized(model)
    return model


def _bias(name: str, finished: Finished, weights: Weights) -> Tensor | None:
    """Bias of a quantized linear as the output holds it."""
    bias_name = f"{name}.bias"
    if bias_name in finished.tensors:
        return finished.tensors[bias_name]
    return weights.get(bias_name) if bias_name in weights else None


@dataclass(slots=True)
class _Summing:
    """Everything a report says, gathered while layers pass by."""

    settings: Settings
    targets: Targets
    facts: dict[str, Any]
    started: float
    parameters: int
    records: dict[str, LayerRecord] = field(default_factory=dict)
    bits: int = 0
    count: int = 0

    def add(self, finished: Finished) -> None:
        """Take in a layer."""
        self.records |= finished.records
        for weight in finished.weights.values():
            self.bits += weight.stored_bits
            self.count += weight.N * weight.K

    def report(self, output: Path | None = None, format: str | None = None) -> QuantizationReport:
        """Return the report."""
        left = self.parameters - self.count
        logger.info("%d of %d parameters stay 16-bit", left, self.parameters)
        return QuantizationReport(
            output=output,
            method=self.settings.method,
            scheme=self.settings.spelling,
            format=format,
            layers=self.records,
            kept=self.targets.kept,
            kept_parameters=left,
            bpw_linear=self.bits / self.count if self.count else 16.0,
            seconds=time.monotonic() - self.started,
            recipe={
                **self.facts,
                "layers": recipe_layers(self.records),
                "kept": self.targets.kept,
                "kept_parameters": left,
            },
        )


def _write_tensors(
    writer: CheckpointWriter, source: Source, partial: Partial, names: Sequence[str], summing: _Summing
) -> None:
    """Write all tensors, from the finished layers and, for the rest, the source."""
    written: set[str] = set()
    for name in names:
        finished = partial.load(name)
        if finished is None:
            raise InputError(f"{partial.folder} lost {name} while the run was going on: run again")
        summing.add(finished)
        for linear, quantized in finished.weights.items():
            try:
                writer.add_quantized(linear, quantized, _bias(linear, finished, source.weights))
            except UnsupportedError as error:
                raise UnsupportedError(
                    f"{error}. The finished layers are kept in {partial.folder}: the same call with another "
                    "format (--format) writes them without repeating the work"
                ) from error
            written |= {f"{linear}.weight", f"{linear}.bias"}
        for tensor_name, tensor in finished.tensors.items():
            if tensor_name not in written:
                writer.add_tensor(tensor_name, tensor)
                written.add(tensor_name)
    for name in source.stored_once():
        if name not in written:
            writer.add_tensor(name, source.weights.get(name))


def _finish(
    writer: CheckpointWriter,
    source: Source,
    targets: Targets,
    settings: Settings,
    report: QuantizationReport,
    tokenizer: Any,
) -> None:
    """Write what a folder holds beside tensors."""
    if source.folder is None and getattr(source.model, "generation_config", None) is not None:
        writer.add_json("generation_config.json", json.loads(source.model.generation_config.to_json_string()))
    details: dict[str, Any] = {}
    if settings.method == "gptq" and report.format in ("gptq", "gptq_v2"):
        details["damp_percent"] = settings.gptq.damp
    elif report.format == "bitsandbytes":
        details |= bitsandbytes_details(source.config.get("dtype"))
    writer.finish(
        source.config,
        report.recipe,
        tokenizer_from=tokenizer if source.folder is None else source.folder,
        skipped=list(targets.kept),
        details=details,
    )
