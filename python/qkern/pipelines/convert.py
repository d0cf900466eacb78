"""The verb `convert`: a quantized checkpoint or GGUF in another checkpoint format, its weights unchanged."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from qkern._progress import track
from qkern.calibration import load_config, meta_model
from qkern.checkpoints import (
    RECIPE_NAME,
    CheckpointWriter,
    check_output,
    format_named,
    parse_size,
    read_json,
    read_quantized,
)
from qkern.checkpoints.bitsandbytes import BITSANDBYTES
from qkern.errors import UnsupportedError
from qkern.gguf import read_tokenizer
from qkern.gguf.checkpoint import GGUFCheckpoint
from qkern.nn import as_linears, expert_parts, named_linears, stored_name, unfuse_experts
from qkern.ops import dequantize_groupwise
from qkern.pipelines.checks import strangers
from qkern.pipelines.conversion import Form, find_form, nearest_schemes, round_again
from qkern.pipelines.history import GGUF_KEY, KEY, folder_grids, spelled_grids, with_grid
from qkern.pipelines.load import is_gguf, model_names
from qkern.schemes import QuantizedWeight, Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from qkern.checkpoints import Format
    from qkern.nn import ExpertPart

__all__ = ["NEAREST", "ConversionReport", "ConvertedLayer", "convert"]

NEAREST: Final = "nearest"
"""What `requantize` says for the nearest scheme that the target holds."""
_HEAD: Final = "lm_head"
# Grids of GGUF's other types that are nearest among schemes.
_NEAREST_OF_TYPES: Final = {
    "q2_k": "w2g16z",
    "q3_k": "w3g16",
    "q4_k": "w4g32z",
    "q5_0": "w8g32",
    "q5_1": "w8g32z",
    "q5_k": "w8g32z",
    "q6_k": "w8g16",
    "iq4_nl": "w4g32",
    "iq4_xs": "w4g32",
}
_SHOWN: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedLayer:
    """What became of a layer.

    Parameters
    ----------
    before : str
        Its scheme, or GGUF type.
    after : str
        The scheme that was written.
    is_exact : bool
        Whether the weights are the same, bit for bit.
    error : float
        ``|W' - W| / |W|``.
    """

    before: str
    after: str
    is_exact: bool
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """Result of `convert`.

    Parameters
    ----------
    output : Path
        Folder that was written.
    source : str
        What was converted.
    before, after : str
        The formats.
    layers : mapping of str to ConvertedLayer
        Every quantized layer.
    decoded : mapping of str to str
        Embedding and head of a GGUF, which checkpoints keep 16-bit, with the scheme or type that they had:
        written in fp32.
    seconds : float
        Time of the run.
    """

    output: Path
    source: str
    before: str
    after: str
    layers: dict[str, ConvertedLayer] = field(repr=False)
    decoded: dict[str, str]
    seconds: float

    @property
    def is_exact(self) -> bool:
        """Whether every weight is the same, bit for bit."""
        return all(layer.is_exact for layer in self.layers.values())

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "output": str(self.output), "is_exact": self.is_exact}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A quantized model: weights of layers, decoded matrices with the type they had, and the rest.

    The model has its experts as linears, `own` its names of everything that is stored, and `layers` the names
    of the quantized ones as keys. What has outliers, of LLM.int8(), keeps columns of activations as they are:
    other formats have weights alone for that.
    """

    name: str
    format: str
    model: Any
    config: dict[str, Any]
    layers: Mapping[str, Any]
    own: dict[str, str]
    weight: Callable[[str], QuantizedWeight]
    coded: dict[str, str]
    plain: tuple[str, ...]
    tensor: Callable[[str], Tensor]
    decoded: dict[str, str] = field(default_factory=dict)
    companions: Any = None
    recipe: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, Any] = field(default_factory=dict)
    has_outliers: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def stored(self, own: str) -> str:
        """Name in files of what the model calls `own`."""
        return stored_name(self.model.config.model_type, own)


@dataclass(frozen=True, slots=True)
class _Rounded:
    """That a layer is rounded anew, and to which grid."""

    scheme: Scheme


Plan: TypeAlias = Form | _Rounded
Rounding: TypeAlias = tuple[Scheme | None]
"""To which scheme layers are rounded again; None: the nearest."""


def convert(
    model: str | Path,
    output: str | Path,
    to: str,
    *,
    requantize: Scheme | str | None = None,
    max_shard_size: int | str = "5GB",
) -> ConversionReport:
    """Write a quantized model in another checkpoint format.

    Every layer keeps its weights, bit for bit: its codes and scales where the target has its grid, else wider
    codes or smaller groups for the same weights. What the target cannot hold so is refused by name before
    anything is written, or rounded again.

    Parameters
    ----------
    model : str or Path
        Folder or hub id in GPTQ (v1, v2), AWQ, compressed-tensors or bitsandbytes, or a GGUF (Llama, Mistral,
        Qwen2, Qwen3) whose Q4_0 and Q8_0 matrices have grids of checkpoints. Of a GGUF everything else is
        written in fp32, in which `qkern.load` has it. The codebooks of bitsandbytes, nf4 and fp4, are grids
        of no target: they are rounded again. Its LLM.int8() keeps its weights, and where it has a threshold
        of outliers nothing says in the output that activations are int8.
    output : str or Path
        Folder to write; must not exist or be empty, and not lie in the model's.
    to : {"gptq", "gptq_v2", "awq", "compressed-tensors"}
        The target.
    requantize : Scheme or str, optional
        Round layers that the target does not hold again, to this scheme, or to the ``"nearest"`` that it
        holds.
    max_shard_size : int or str
        Of the written safetensors.

    Returns
    -------
    ConversionReport
        What became of each layer.

    Raises
    ------
    InputError
        On an argument that cannot be, or if there is no such model.
    FormatError
        If the model's files are damaged.
    UnsupportedError
        If the model is not quantized, the target is bitsandbytes, or it does not hold a layer; nothing is
        written.
    OutputError
        If the disk is full; nothing is left behind.
    """
    started = time.monotonic()
    if to == "gguf":
        raise UnsupportedError("convert writes folders: qkern.export_gguf (qkern export-gguf) writes GGUF")
    fmt = format_named(to)
    if fmt.name == BITSANDBYTES.name:
        raise UnsupportedError(
            "convert does not write bitsandbytes, whose codebooks and scales no other format has: quantize "
            "the original model with scheme='nf4g64', or load it with int8=True and save it"
        )
    parse_size(max_shard_size)
    scheme = None if requantize in (None, NEAREST) else as_scheme(requantize)
    opened = (_open_gguf if is_gguf(model) else _open_folder)(model)
    folder = check_output(output, source=model if Path(model).is_dir() else None)
    with opened as source:
        rounding = None if requantize is None else (scheme,)
        plans = _planned(source, fmt, rounding)
        report = ConversionReport(
            output=folder,
            source=source.name,
            before=source.format,
            after=fmt.name,
            layers={},
            decoded=source.decoded,
            seconds=0.0,
        )
        with CheckpointWriter(folder, format=fmt.name, max_shard_size=max_shard_size) as writer:
            for name in track(list(plans), f"Converting to {fmt.name}", unit="layer"):
                weight, report.layers[name] = _converted(source, fmt, name, plans[name])
                writer.add_quantized(name, weight)
            parts = expert_parts(source.model)
            for name in source.plain:
                if name not in source.coded:
                    _copy(writer, source, name, parts)
            _finish(writer, source, report, requantize)
    return replace(report, seconds=time.monotonic() - started)


def _copy(
    writer: CheckpointWriter, source: _Source, name: str, parts: Mapping[str, Mapping[str, ExpertPart]]
) -> None:
    """Write a tensor as it is; of fused experts each by itself, as runtimes expect in such files."""
    for own, tensor in as_linears(source.own[name], source.tensor(name), parts).items():
        writer.add_tensor(name if own == source.own[name] else source.stored(own), tensor)


def _finish(
    writer: CheckpointWriter, source: _Source, report: ConversionReport, requantize: Scheme | str | None
) -> None:
    grids = dict(source.grids)
    for name, layer in report.layers.items():
        before = source.grids.get(name) or [layer.before]
        grids[name] = with_grid(before, layer.after, is_exact=layer.is_exact)
    for tensor, before in report.decoded.items():
        name = tensor.removesuffix(".weight")
        grids[name] = source.grids.get(name) or [before]
    recipe = {
        "source": source.name,
        "arguments": {"to": report.after, "requantize": None if requantize is None else str(requantize)},
        "converted_from": report.before,
        "layers": {name: asdict(layer) for name, layer in report.layers.items()},
        "decoded": report.decoded,
        KEY: {name: passed for name, passed in grids.items() if passed},
        "source_recipe": source.recipe,
    }
    writer.finish(
        source.config,
        recipe,
        tokenizer_from=source.companions,
        skipped=_skipped(source, report.layers),
        details=source.details if report.after.startswith("gptq") else None,
    )


def _skipped(source: _Source, quantized: Iterable[str]) -> list[str]:
    """Linears that stay as they are, which runtimes must know, by their names in files."""
    gone = {source.own[name] for name in quantized}
    names = (*named_linears(source.model), *strangers(source.model))
    return [source.stored(name) for name in names if name not in gone]


# What becomes of each layer --------------------------------------------------------------------------------


def _planned(source: _Source, fmt: Format, rounding: Rounding | None) -> dict[str, Plan]:
    """Say of every layer how it is written; nothing is written yet.

    Raises
    ------
    UnsupportedError
        Naming layers that the format does not hold.
    """
    plans, schemes = _forms(source, fmt, rounding, None)
    skipped = _skipped(source, plans)
    reason = fmt.holds_together(schemes, skipped)
    sizes = {scheme.group_size for scheme in schemes.values()}
    if reason is not None and len(sizes) > 1:
        plans, schemes = _forms(source, fmt, rounding, min(size for size in sizes if size is not None))
        reason = fmt.holds_together(schemes, skipped)
    if reason is not None:
        raise UnsupportedError(f"{fmt.name} does not hold the layers of {source.name} together: {reason}")
    return plans


def _forms(
    source: _Source, fmt: Format, rounding: Rounding | None, group_size: int | None
) -> tuple[dict[str, Plan], dict[str, Scheme]]:
    plans: dict[str, Plan] = {}
    schemes: dict[str, Scheme] = {}
    refused: list[str] = []
    names = [*source.layers, *(name.removesuffix(".weight") for name in source.coded)]
    for name in track(names, f"Asking {fmt.name}", unit="layer"):
        qw = source.weight(name) if name in source.layers else None
        found: Form | str = f"{name}: {source.coded.get(f'{name}.weight')} is no grid of {fmt.name}"
        if qw is not None:
            found = find_form(fmt, name, qw, group_size=group_size, is_unmarked=source.has_outliers)
            # Without its mark of int8 activations a layer has the same weights, which is as near as can be.
            if isinstance(found, str) and rounding in ((None,), (qw.scheme.weight_only(),)):
                found = find_form(fmt, name, qw, group_size=group_size, is_unmarked=True)
        if isinstance(found, Form):
            assert qw is not None
            form = found.of(qw)
            assert form is not None
            plans[name], schemes[name] = found, form.scheme
        elif rounding is None:
            refused.append(found)
        else:
            candidates = _candidates(source, name, qw, rounding[0])
            made, _ = round_again(fmt, name, _dense(source, name), candidates, group_size=group_size)
            plans[name], schemes[name] = _Rounded(made.scheme), made.scheme
    if refused:
        more = f"; and {len(refused) - _SHOWN} more layers" if len(refused) > _SHOWN else ""
        raise UnsupportedError(
            f"{source.name} cannot be written as {fmt.name} without rounding again: "
            f"{'; '.join(refused[:_SHOWN])}{more}. Choose another format, or round these layers again with "
            f"requantize={NEAREST!r} or a scheme (--requantize)"
        )
    return plans, schemes


def _candidates(
    source: _Source, name: str, qw: QuantizedWeight | None, scheme: Scheme | None
) -> Sequence[Scheme]:
    if scheme is not None:
        return (scheme,)
    if qw is None:
        return tuple(nearest_schemes(Scheme.parse(_NEAREST_OF_TYPES[source.coded[f"{name}.weight"]])))
    return tuple(nearest_schemes(qw.scheme))


def _dense(source: _Source, name: str) -> Tensor:
    if name in source.layers:
        return dequantize_groupwise(source.weight(name))
    return source.tensor(f"{name}.weight")


def _converted(source: _Source, fmt: Format, name: str, plan: Plan) -> tuple[QuantizedWeight, ConvertedLayer]:
    before = source.coded.get(f"{name}.weight", "")
    if isinstance(plan, _Rounded):
        weight, error = round_again(fmt, name, _dense(source, name), (plan.scheme,))
        before = before or str(source.weight(name).scheme)
        return weight, ConvertedLayer(
            before=before, after=str(weight.scheme), is_exact=error == 0, error=error
        )
    own = source.weight(name)
    form = plan.of(own)
    assert form is not None
    return form, ConvertedLayer(before=str(own.scheme), after=str(form.scheme), is_exact=True, error=0.0)


# Where layers come from ------------------------------------------------------------------------------------


@contextmanager
def _open_folder(path: str | Path) -> Iterator[_Source]:
    with read_quantized(path) as checkpoint:
        assert checkpoint.format is not None
        config = load_config(checkpoint.folder)
        if _HEAD in checkpoint.entries:
            config.tie_word_embeddings = False
        damp = checkpoint.quantization.get("damp_percent")
        file = checkpoint.folder / RECIPE_NAME
        recipe = read_json(file) if file.exists() else {}
        model = meta_model(config)
        unfuse_experts(model)
        yield _Source(
            name=str(path),
            format=checkpoint.format.name,
            model=model,
            config=checkpoint.config,
            layers=checkpoint.entries,
            own=model_names(checkpoint, model),
            weight=checkpoint.weight,
            coded={},
            plain=tuple(checkpoint.plain),
            tensor=checkpoint.tensors.__getitem__,
            companions=checkpoint.folder,
            recipe=recipe,
            grids=folder_grids(checkpoint.folder),
            has_outliers=any(entry.threshold is not None for entry in checkpoint.entries.values()),
            details={} if damp is None else {"damp_percent": damp},
        )


@contextmanager
def _open_gguf(path: str | Path) -> Iterator[_Source]:
    with GGUFCheckpoint(path) as checkpoint:
        config = checkpoint.transformers_config()
        model = meta_model(config)
        linears = {f"{name}.weight" for name in named_linears(model)}
        types = {name: checkpoint.type_of(name) for name in checkpoint.plain}
        embedding = checkpoint.embedding

        def tensor(name: str) -> Tensor:
            if embedding is not None and name == f"{embedding}.weight":
                return dequantize_groupwise(checkpoint.weight(embedding))
            return checkpoint.tensors[name]

        # Embeddings and heads are what checkpoints keep 16-bit: they are decoded.
        coded = {name: kind for name, kind in types.items() if kind in _NEAREST_OF_TYPES}
        decoded = {name: kind for name, kind in coded.items() if name not in linears - {f"{_HEAD}.weight"}}
        stays = {}
        if embedding is not None:
            stays[f"{embedding}.weight"] = checkpoint.type_of(f"{embedding}.weight")
        stems = [name.removesuffix(".weight") for name in (*stays, *coded)]
        said = spelled_grids(checkpoint.file.metadata.get(GGUF_KEY, {}), f"{GGUF_KEY} of {path}")
        places = (*stays, *checkpoint.plain, *(f"{name}.weight" for name in checkpoint.entries))
        files = {place.removesuffix(".weight"): checkpoint.file_name(place) for place in places}
        yield _Source(
            name=str(path),
            format="gguf",
            model=model,
            config={**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"},
            layers=dict.fromkeys(checkpoint.entries),
            own={name: name for name in (*checkpoint.entries, *stays, *checkpoint.plain, *stems)},
            weight=checkpoint.weight,
            coded={name: kind for name, kind in coded.items() if name not in decoded},
            plain=(*stays, *checkpoint.plain),
            tensor=tensor,
            decoded={**stays, **decoded},
            companions=read_tokenizer(path),
            grids={stem: said[file] for stem, file in files.items() if file in said},
        )
