"""What is refused before any work: bad arguments, experts in 3-D, formats that cannot hold a layer."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from qkern.checkpoints import QuantizedCheckpoint, format_named, refusals
from qkern.errors import InputError, UnsupportedError
from qkern.gguf import GGUFArchitecture, architecture_for
from qkern.gguf.writer import check_new_file
from qkern.models import Structure, column_weight, is_router
from qkern.nn import FakeQuantLinear, lies_in, name_matches, named_linears, refuse_experts, role
from qkern.pipelines.layerwise import Settings
from qkern.quantizers import GPTQConfig, default_search
from qkern.quantizers.observers import checked_observer
from qkern.quantizers.smoothquant import check_alpha
from qkern.schemes import Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from qkern.search import MixedPrecision

__all__ = [
    "GGUF_METHODS",
    "METHODS",
    "Targets",
    "assigned_schemes",
    "check_calibration",
    "check_gguf_output",
    "check_gguf_request",
    "checked_architecture",
    "checked_format",
    "checked_settings",
    "choose_targets",
    "default_format",
    "find_format",
    "find_targets",
    "log_kept",
    "refuse_adapters",
    "refuse_training",
    "strangers",
    "target_names",
]

logger = logging.getLogger(__name__)

METHODS: Final = ("gptq", "awq", "rtn", "smoothquant")
GGUF_METHODS: Final = ("gptq", "awq", "rtn")
ACTIVATIONS: Final = ("dynamic", "static")
# Searches that one method alone has.
_SEARCHES: Final = {"gptq": ("loss",), "rtn": ("absmax",)}
# How calibration texts are drawn where nothing else is said.
_DRAW: Final = {"samples": 128, "length": 2048, "seed": 0, "device": "auto"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Which linears are quantized.

    Parameters
    ----------
    layers : list of list of str
        By decoder layer, names inside the layer.
    head : bool
        The output head too.
    kept : dict
        Linears that stay 16-bit, and why.
    """

    layers: list[list[str]]
    head: bool
    kept: dict[str, str]


def checked_settings(
    method: str,
    scheme: Scheme | str | None,
    damp: float = 0.05,
    act_order: Any = "group-aware",
    static_groups: bool = False,
    block_size: int = 128,
    search: str | None = None,
    scale_only: bool = False,
    assignment: MixedPrecision | None = None,
    *,
    alpha: float | str | None = None,
    activations: str = "dynamic",
    observer: str | None = None,
) -> Settings:
    """Arguments as `Settings`; of an assignment the schemes are not known yet.

    Raises
    ------
    InputError
        On a value that is not allowed.
    UnsupportedError
        On a scheme that the method does not make.
    """
    if method not in METHODS:
        raise InputError(
            f"unknown method {method!r}: allowed are {', '.join(METHODS)}; nf4 and fp4 are schemes of rtn, "
            "LLM.int8() is qkern.load with int8=True"
        )
    if assignment is not None and scheme is not None:
        raise InputError(
            f"the assignment says the scheme of every linear: got scheme {str(scheme)!r} too; leave one out"
        )
    alpha = _checked_alpha(method, alpha)
    observer = _checked_observer(activations, observer)
    parsed = None
    if assignment is None:
        if scheme is None:
            scheme = "w8a8" if alpha is not None else "w4g128z" if method == "awq" else "w4g128"
        parsed = as_scheme(scheme)
        _check_scheme(parsed, method)
        _check_activations([parsed], alpha, observer)
    if scale_only and method != "awq":
        raise InputError(f"scale_only folds AWQ's scales: got method {method!r}; use method='awq'")
    allowed = ("minmax", "mse", *_SEARCHES.get(method, ()))
    if search is not None and search not in allowed:
        raise InputError(f"unknown search {search!r} for {method}: allowed are {', '.join(allowed)}")
    given = {"damp": damp, "act_order": act_order, "static_groups": static_groups, "block_size": block_size}
    foreign = [name for name, value in given.items() if value != getattr(GPTQConfig(), name)]
    if method != "gptq" and foreign:
        raise InputError(
            f"{', '.join(foreign)} (desc_act is act_order) is for method 'gptq' alone: got method "
            f"{method!r}; use 'gptq', or leave it out"
        )
    gptq = GPTQConfig(damp=damp, act_order=act_order, static_groups=static_groups, block_size=block_size)
    if search is not None and method == "gptq":
        gptq = replace(gptq, search=search)  # type: ignore[arg-type]
    return Settings(
        method=method,
        scheme=parsed,
        gptq=gptq,
        search=search or (None if parsed is None else default_search(parsed)),
        scale_only=scale_only,
        alpha=alpha,
        observer=observer,
    )


def _checked_alpha(method: str, alpha: float | str | None) -> float | str | None:
    if alpha is None:
        return "auto" if method == "smoothquant" else None
    if method not in ("smoothquant", "gptq"):
        raise InputError(
            f"alpha is SmoothQuant's: got method {method!r}; use method='smoothquant', or 'gptq' to round "
            "the smoothed weights with it"
        )
    check_alpha(alpha)
    return alpha


def _checked_observer(activations: str, observer: str | None) -> str | None:
    if activations not in ACTIVATIONS:
        raise InputError(f"unknown activations: got {activations!r}, allowed are {', '.join(ACTIVATIONS)}")
    if activations == "static":
        return checked_observer(observer or "mse")
    if observer is not None:
        raise InputError(
            f"observer {observer!r} chooses static scales: got activations 'dynamic', which have a scale a "
            "token; use activations='static' (--activations static)"
        )
    return None


def _check_activations(schemes: Collection[Scheme], alpha: float | str | None, observer: str | None) -> None:
    """Refuse SmoothQuant or static scales where activations are not quantized, or otherwise."""
    int8 = [scheme for scheme in schemes if scheme.act_bits is not None]
    if (alpha is not None or observer is not None) and not int8:
        what = "static scales are those of int8 activations"
        if alpha is not None:
            what = "SmoothQuant makes room for int8 activations"
        raise InputError(
            f"{what}, and none are quantized: got {', '.join(map(str, schemes))}; use a scheme with a8, for "
            "example w8a8"
        )
    other = next((scheme for scheme in int8 if not scheme.has_plain_sums), None)
    if observer is not None and other is not None:
        raise UnsupportedError(
            f"static activations go with 8-bit weights of one scale a channel, w8a8: got {other}; "
            "use activations='dynamic'"
        )


def _check_scheme(parsed: Scheme, method: str) -> None:
    if method != "rtn" and (parsed.codebook is not None or parsed.double_quant):
        raise UnsupportedError(
            f"method {method} quantizes on uniform grids with plain scales: got {parsed}; use method='rtn'"
        )


def assigned_schemes(
    model: Any, structure: Structure, assignment: MixedPrecision, settings: Settings
) -> tuple[Settings, Targets]:
    """Schemes of an assignment, and which linears that makes targets; all others stay 16-bit.

    Raises
    ------
    InputError
        If the assignment names what is not there, or nothing to quantize.
    UnsupportedError
        If the method does not make a scheme, or on a tied head.
    """
    linears = list(named_linears(model))
    schemes = assignment.schemes(linears)
    for name, scheme in schemes.items():
        try:
            _check_scheme(scheme, settings.method)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from error
    inside = f"{structure.layers}."
    layers: list[list[str]] = [[] for _ in range(structure.count)]
    for name in schemes:
        if name == structure.head:
            _refuse_tied(structure, f", by patterns that do not fit it, such as '{inside}*'")
        elif name.startswith(inside):
            index, _, rest = name.removeprefix(inside).partition(".")
            layers[int(index)].append(rest)
        else:
            raise UnsupportedError(
                f"the assignment names {name}, which lies outside the decoder layers: linears of the layers "
                f"and the head are quantized"
            )
    if not schemes:
        raise InputError("the assignment leaves every linear 16-bit: there is nothing to quantize")
    _check_activations(set(schemes.values()), settings.alpha, settings.observer)
    kept = {name: "16-bit by the assignment" for name in linears if name not in schemes} | strangers(model)
    targets = Targets(layers=layers, head=structure.head in schemes, kept=kept)
    return replace(settings, schemes=schemes), targets


def find_targets(
    model: Any,
    structure: Structure,
    settings: Settings,
    assignment: MixedPrecision | None,
    skip: Sequence[str],
    include: Sequence[str],
) -> tuple[Settings, Targets]:
    """Say which linears are quantized, by an assignment or by names, and on which grids.

    Raises
    ------
    InputError
        If both are given, and as `assigned_schemes` and `choose_targets`.
    UnsupportedError
        As these.
    """
    if assignment is None:
        return settings, choose_targets(model, structure, skip, include)
    if skip or include:
        raise InputError("the assignment says which linears are quantized: leave skip and include out")
    return assigned_schemes(model, structure, assignment, settings)


def _refuse_tied(structure: Structure, hint: str = "") -> None:
    if structure.tied:
        raise UnsupportedError(
            f"{structure.head} is tied to the input embedding, which no checkpoint format holds quantized: "
            f"leave it 16-bit{hint}"
        )


def choose_targets(model: Any, structure: Structure, skip: Sequence[str], include: Sequence[str]) -> Targets:
    """Sort every linear of the model into those to quantize and those that stay, with the reason.

    Raises
    ------
    InputError
        If a pattern matches nothing, or nothing is left to quantize.
    UnsupportedError
        On experts in 3-D parameters that qkern does not know and that are not skipped, and on a tied head.
    """
    inside = f"{structure.layers}."
    refuse_experts(model, skip=skip)
    layers: list[list[str]] = [[] for _ in range(structure.count)]
    kept: dict[str, str] = {}
    head = False
    used: set[str] = set()
    for name in named_linears(model):
        used.update(pattern for pattern in skip if lies_in(name, [pattern]))
        used.update(pattern for pattern in include if name_matches(name, [pattern]))
        if lies_in(name, skip):
            kept[name] = "named in skip"
        elif name == structure.head:
            head = name_matches(name, include)
            if head:
                _refuse_tied(structure)
            else:
                kept[name] = "output head"
        elif not name.startswith(inside):
            kept[name] = "outside the decoder layers"
        elif is_router(name) and not name_matches(name, include):
            kept[name] = "router"
        else:
            index, _, rest = name.removeprefix(inside).partition(".")
            layers[int(index)].append(rest)
    kept |= strangers(model)
    # What is no linear is left 16-bit anyway, so that it may be skipped by name.
    unused = [
        pattern
        for pattern in (*skip, *include)
        if pattern not in used and (pattern in include or not _names_parameter(model, pattern))
    ]
    if unused:
        raise InputError(
            f"{unused[0]!r} in skip or include matches no linear of {type(model).__name__}: patterns are "
            "names, ends of names or globs, for example 'mlp.down_proj' or '*.layers.0.*'"
        )
    if not any(layers) and not head:
        raise InputError(f"nothing to quantize in {type(model).__name__}: every linear is skipped")
    return Targets(layers=layers, head=head, kept=kept)


def refuse_adapters(model: Any) -> None:
    """Refuse a model with PEFT's adapters, whose layers are named and computed otherwise.

    Raises
    ------
    InputError
        If it has any.
    """
    if getattr(model, "peft_config", None):
        raise InputError(
            f"the model has adapters of PEFT ({', '.join(model.peft_config)}): merge them first with "
            "qkern.integrations.peft.merge, or save them beside the model with PEFT's save_pretrained"
        )


def refuse_training(model: nn.Module) -> None:
    """Refuse a model with `FakeQuantLinear` layers, which no checkpoint format holds.

    Raises
    ------
    UnsupportedError
        If it has any.
    """
    trained = [name for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)]
    if trained:
        raise UnsupportedError(
            f"no checkpoint format holds layers in training: got {len(trained)} FakeQuantLinear, first "
            f"{trained[0]}; call qkern.convert_qat(model), or keep its state_dict"
        )


def strangers(model: nn.Module) -> dict[str, str]:
    """Modules with a matrix of weights that are no plain linear and no embedding."""
    plain = {id(module) for module in named_linears(model).values()}
    return {
        name: f"a {type(module).__name__}, no plain linear"
        for name, module in model.named_modules()
        if id(module) not in plain
        and not isinstance(module, nn.Embedding)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }


def _names_parameter(model: nn.Module, pattern: str) -> bool:
    names = {name for name, _ in model.named_parameters()}
    return any(name_matches(part, [pattern]) for name in names for part in (name, name.rpartition(".")[0]))


def default_format(schemes: Collection[Scheme], *, is_assigned: bool = False) -> tuple[str, ...]:
    """Return the formats for schemes in the order of preference: what most runtimes load comes first.

    Asymmetric 4-bit goes to AWQ, symmetric 4 and 8-bit to GPTQ; runtimes load 2 and 3-bit weights,
    asymmetric 8-bit ones and mixtures from compressed-tensors only, which alone says that activations are
    quantized. nf4 and fp4 are bitsandbytes'. What an assignment names is a mixture, even of one scheme: a
    search counts the bytes that mixtures take.
    """
    if any(scheme.codebook is not None for scheme in schemes):
        return ("bitsandbytes",)
    if any(scheme.act_bits is not None for scheme in schemes):
        return ("compressed-tensors",)
    if len(schemes) > 1 or is_assigned:
        return ("compressed-tensors", "gptq_v2")
    (scheme,) = schemes
    if scheme.zero_point:
        rest = ("compressed-tensors", "gptq_v2")
        return ("awq", *rest) if scheme.bits == 4 else rest
    return ("gptq", "compressed-tensors") if scheme.bits in (4, 8) else ("compressed-tensors", "gptq")


def checked_format(
    model: Any, structure: Structure, targets: Targets, settings: Settings, wanted: str | None
) -> str:
    """Return the format to write, after asking it about every layer.

    Raises
    ------
    UnsupportedError
        If the wanted format, or every default one, cannot hold some layer.
    """
    name, reasons = find_format(model, structure, targets, settings, wanted)
    if name is None:
        how = 'by "16" in the assignment' if settings.schemes else "with skip (--skip)"
        raise UnsupportedError(
            f"no work was done: {'. '.join(reasons)}. Choose another scheme or format, or leave the layers "
            f"16-bit {how}"
        )
    if reasons:
        logger.info("writing %s: %s", name, "; ".join(reasons))
    return name


def find_format(
    model: Any, structure: Structure, targets: Targets, settings: Settings, wanted: str | None
) -> tuple[str | None, list[str]]:
    """Return the format to write, None if there is none, and what those before it do not hold."""
    shapes = {}
    for name in target_names(structure, targets):
        N, K = column_weight(model.get_submodule(name)).shape
        shapes[name] = (settings.scheme_of(name), N, K)
    schemes = {name: scheme for name, (scheme, _, _) in shapes.items()}
    gptq = settings.gptq
    # Static groups keep each column in the group it lies in, whatever the order.
    act_order = settings.method == "gptq" and gptq.act_order == "desc_act" and not gptq.static_groups
    reasons: list[str] = []
    assigned = settings.scheme is None
    for name in (wanted,) if wanted else default_format(set(schemes.values()), is_assigned=assigned):
        candidate = format_named(name)
        refused = refusals(candidate, shapes, act_order=act_order)
        together = candidate.holds_together(schemes, list(targets.kept))
        if not refused and together is None:
            return name, reasons
        first = [f"{layer}: {reason}" for layer, reason in list(refused.items())[:3]]
        more = f"; and {len(refused) - 3} more layers" if len(refused) > 3 else ""
        reasons.append(f"{name} does not hold {'; '.join(first)}{more}" if first else f"{name}: {together}")
    return None, reasons


def target_names(structure: Structure, targets: Targets) -> list[str]:
    """Full names of the linears to quantize."""
    names = [
        f"{structure.layers}.{index}.{name}" for index, layer in enumerate(targets.layers) for name in layer
    ]
    if targets.head and structure.head is not None:
        names.append(structure.head)
    return names


def log_kept(model: Any, names: Iterable[str], targets: Targets) -> None:
    """Log what stays 16-bit where linears of these names are about to be quantized."""
    total = sum(parameter.numel() for parameter in model.parameters())
    left = total - sum(model.get_parameter(f"{name}.weight").numel() for name in names)
    kept = Counter((role(name), reason) for name, reason in targets.kept.items())
    named = [f"{count} {name} ({reason})" for (name, reason), count in kept.items()]
    logger.info("%d of %d parameters stay 16-bit, with those of %s", left, total, ", ".join(named))


def check_gguf_request(method: str, calibration: Any, imatrix: Any, draw: Mapping[str, Any]) -> None:
    """Refuse a method of an export that is unknown or lacks what it needs, and what it would not look at.

    Parameters
    ----------
    method, calibration, imatrix
        As in `qkern.export_gguf`.
    draw : mapping
        How calibration texts are drawn, and where they run.

    Raises
    ------
    InputError
        If so.
    """
    if method not in GGUF_METHODS:
        raise InputError(f"unknown method {method!r}: allowed are {', '.join(GGUF_METHODS)}")
    if method != "rtn":
        needs = f"method {method} measures activations layer by layer, of causal LMs without experts"
        if imatrix is not None:
            raise InputError(
                f"{needs}: an importance matrix does not hold them; give calibration texts instead "
                "(--calibration FILE), or use method='rtn'"
            )
        if calibration is None:
            raise InputError(f"{needs}: give calibration texts (--calibration FILE), or use method='rtn'")
    if calibration is not None and imatrix is not None:
        raise InputError(
            "calibration and imatrix are two sources of the same importance: give one (--calibration FILE or "
            "--imatrix FILE)"
        )
    foreign = [name for name, value in draw.items() if value != _DRAW[name]]
    if calibration is None and foreign:
        raise InputError(
            f"{', '.join(foreign)} {'is' if len(foreign) == 1 else 'are'} the calibration's, and there is "
            "none: give texts (--calibration FILE), or leave it out"
        )


def check_gguf_output(path: Path, *, modelfile: bool, in_parts: bool) -> None:
    """Refuse an output of an export that cannot be, or that nothing would take for a GGUF.

    Raises
    ------
    InputError
        If so.
    """
    if path.suffix != ".gguf" and not path.is_dir():
        raise InputError(
            f"{path} must end in .gguf, by which a file is told from a folder, a hub id and a model's own "
            f"files: name it {path.with_suffix('.gguf').name}"
        )
    recipe = path.with_name("Modelfile")
    if modelfile and in_parts:
        raise InputError("Ollama reads one file: choose modelfile or max_shard_size")
    if modelfile and recipe.exists():
        raise InputError(f"{recipe} exists: remove it, or choose an --output in another folder")
    check_new_file(path)


def checked_architecture(model_type: str | None) -> GGUFArchitecture:
    """Look the architecture of a model up whose activations are wanted.

    Raises
    ------
    UnsupportedError
        If it is not exported to GGUF, or is an encoder.
    """
    architecture = architecture_for(str(model_type))
    if architecture.is_encoder:
        raise UnsupportedError(
            f"{model_type} is an encoder, and activations are collected from causal LMs alone: export it "
            "without calibration, or with an importance matrix from elsewhere (--imatrix FILE)"
        )
    return architecture


def check_calibration(checkpoint: QuantizedCheckpoint, method: str) -> None:
    """Refuse a checkpoint that calibration texts cannot run through, or not by this method.

    Raises
    ------
    InputError
        If it is quantized already.
    UnsupportedError
        If it is an encoder, or the method does not follow its experts.
    """
    architecture = checked_architecture(checkpoint.config.get("model_type"))
    if method != "rtn" and architecture.has_experts:
        raise UnsupportedError(
            f"method {method} does not follow mixtures of experts ({architecture.model_type}), whose "
            "matrices are one stack in the file: use method='rtn', with calibration if you like"
        )
    if checkpoint.format is not None:
        raise InputError(
            f"{checkpoint.folder} is already quantized ({checkpoint.format.name}), and calibration texts run "
            "through 16-bit weights: quantize the original, or leave calibration out"
        )
