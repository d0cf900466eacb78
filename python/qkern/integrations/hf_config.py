"""What transformers is told about a quantization: `QkernConfig`, and what a checkpoint says of itself."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import transformers
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkern.checkpoints import detect, format_named
from qkern.errors import FormatError, InputError
from qkern.nn.linear import COMPUTE
from qkern.pipelines import quantize
from qkern.pipelines.checks import checked_settings
from qkern.schemes import Scheme
from qkern.search import MixedPrecision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qkern.pipelines.layerwise import Settings

__all__ = [
    "STORED",
    "WRITTEN",
    "AwqConfig",
    "BitsAndBytesConfig",
    "CompressedTensorsConfig",
    "GPTQConfig",
    "QkernConfig",
    "StoredConfig",
]

logger = logging.getLogger(__name__)

# Arguments of `quantize` that QkernConfig, from_pretrained or save_pretrained have themselves.
_ELSEWHERE: Final = {
    "model",
    "method",
    "scheme",
    "output",
    "format",
    "max_shard_size",
    "resume",
    "scale_only",
}
OPTIONS: Final = tuple(name for name in inspect.signature(quantize).parameters if name not in _ELSEWHERE)
# No values that a config.json could show.
_UNSHOWN: Final = ("calibration", "tokenizer")

# Names of AutoAWQ, GPTQModel and transformers: the same thing under another name,
_RENAMED: Final = {
    "w_bit": "bits",
    "q_group_size": "group_size",
    "damp_percent": "damp",
    "dataset": "calibration",
    "model_seqlen": "length",
    "modules_to_not_convert": "skip",
    "version": "format",
    "checkpoint_format": "format",
}
# what a scheme and act_order are made up of,
_SCHEME: Final = ("bits", "group_size", "sym", "zero_point")
_ORDER: Final = ("desc_act", "act_group_aware")
# and what qkern does one way only.
_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "true_sequential": (True,),
    "backend": (None, "auto"),
    "pack_dtype": ("int32",),
    "meta": (None,),
}
# Fields of transformers' own classes that mean something however they came by their value.
_MEANT: Final = {
    "gptq": ("bits", "group_size", "sym", "damp_percent", *_ORDER),
    "awq": ("bits", "group_size", "zero_point"),
}


class QkernConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config=`` of ``from_pretrained`` that quantizes a 16-bit model while it is loaded.

    Rounding to nearest (the default) takes each weight as it is read, so no more than the quantized model
    and a weight is in memory, but for experts that the files have in 3-D parameters: these are rounded when
    all of the model is read. Other methods run `qkern.quantize` on the loaded model.

    Parameters
    ----------
    scheme : Scheme or str, optional
        For example ``"w4g128"``; default: as `qkern.quantize`.
    method : {"rtn", "gptq", "awq", "smoothquant"}
        All but the first need `calibration`.
    compute : {"auto", "float", "int8"}
        Arithmetic of every `QuantLinear`.
    format : str, optional
        What ``save_pretrained`` writes: ``gptq``, ``gptq_v2``, ``awq`` or ``compressed-tensors``; default: as
        `qkern.save`.
    **options
        Further arguments of `qkern.quantize`, such as ``calibration``, ``skip`` or ``assignment``, and the
        names by which AutoAWQ and GPTQModel call these: ``bits``, ``group_size``, ``sym``, ``zero_point``,
        ``desc_act``, ``damp_percent``, ``dataset``, ``modules_to_not_convert`` and others. ``tokenizer`` may
        be a folder or hub id.

    Raises
    ------
    InputError
        On an argument that qkern does not know, or that says what qkern does not do.
    UnsupportedError
        On a scheme that the method does not make.
    """

    def __init__(
        self,
        scheme: Scheme | str | None = None,
        *,
        method: str = "rtn",
        compute: str = "auto",
        format: str | None = None,
        **options: Any,
    ) -> None:
        if format is not None:
            options["format"] = format
        options = _translated(method, scheme, options)
        assignment = options.get("assignment")
        if assignment is not None:
            options["assignment"] = MixedPrecision.of(assignment)
        if compute not in COMPUTE:
            raise InputError(f"unknown compute: got {compute!r}, allowed are {', '.join(COMPUTE)}")
        self.quant_method = "qkern"
        self.method = method
        self.scheme = options.pop("scheme", None)
        self.compute = compute
        self.format = options.pop("format", None)
        if self.format is not None:
            format_named(self.format)
        self.options = options
        settings = self.settings()
        if settings.scheme is not None:
            self.scheme = settings.spelling
        if not settings.reads_text and options.get("calibration") is not None:
            raise InputError(
                f"calibration is given, which method {method} does not read: say method='gptq' (or awq, "
                "smoothquant), or leave calibration out"
            )
        if settings.reads_text and options.get("calibration") is None:
            raise InputError(
                f"calibration is missing: method {method} measures activations on text; give calibration= "
                "(of GPTQConfig and AwqConfig dataset=) a text file, a list of texts or token ids, or use "
                "QkernConfig with method='rtn'"
            )

    def settings(self) -> Settings:
        """Return what `qkern.quantize` would do to every linear.

        Raises
        ------
        InputError
            On a value that is not allowed.
        UnsupportedError
            On a scheme that the method does not make.
        """
        known = inspect.signature(checked_settings).parameters
        chosen = {name: value for name, value in self.options.items() if name in known}
        return checked_settings(self.method, self.scheme, **chosen)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Make one from its fields, as transformers' classes do."""
        fields = {name: value for name, value in config_dict.items() if name != "quant_method"}
        config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, config: Any) -> QkernConfig:
        """Translate a ``GPTQConfig`` or ``AwqConfig`` of transformers.

        Raises
        ------
        InputError
            If it asks for what qkern does not do, or is another class.
        """
        if isinstance(config, cls):
            return config
        method = str(getattr(config.quant_method, "value", config.quant_method))
        if method not in _MEANT:
            raise InputError(
                f"{type(config).__name__} describes a checkpoint, and the model is 16-bit: to quantize "
                'it now use QkernConfig("w4g128")'
            )
        usual = vars(type(config)(bits=config.bits))
        fields = {
            name: value
            for name, value in vars(config).items()
            if name in _MEANT[method] or (name != "quant_method" and value != usual[name])
        }
        return cls(method=method, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Everything that is a JSON value; calibration and tokenizer are left out."""
        options = {name: value for name, value in self.options.items() if name not in _UNSHOWN}
        if "assignment" in options:
            options["assignment"] = dict(options["assignment"].choices)
        fields = {
            "quant_method": self.quant_method,
            "scheme": self.scheme,
            "method": self.method,
            "compute": self.compute,
            "format": self.format,
            **options,
        }
        return {name: value for name, value in fields.items() if value is not None}


def _translated(method: str, scheme: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments under qkern's names.

    Raises
    ------
    InputError
        On a name that is unknown or given twice, or a value by which qkern cannot go.
    """
    options: dict[str, Any] = {} if scheme is None else {"scheme": scheme}
    for name, value in given.items():
        own = _RENAMED.get(name, name)
        if own in options:
            raise InputError(f"{name} says the same as another argument: give one of them")
        options[own] = value
    for name, allowed in _FIXED.items():
        value = options.pop(name, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{name}={value!r} has no meaning here: allowed is {' or '.join(map(repr, allowed))}; leave "
                "it out"
            )
    for own, (names, made_of) in _COMPOSED.items():
        parts = {name: options.pop(name) for name in names if name in options}
        if parts and own in options:
            raise InputError(f"{', '.join(parts)} and {own} say the same: give one of them")
        if parts:
            options[own] = made_of(method, **parts)
    for name, spelled in _SPELLED.items():
        if options.get(name) is not None:
            options[name] = spelled(options[name])
    unknown = sorted(options.keys() - {*OPTIONS, "scheme", "format"})
    if unknown:
        others = (*_RENAMED, *_FIXED, *(name for names, _ in _COMPOSED.values() for name in names))
        raise InputError(
            f"{', '.join(unknown)} cannot be given to qkern: allowed are scheme, method, compute, format, "
            f"{', '.join(OPTIONS)}, and of other libraries {', '.join(others)}; leave it out"
        )
    return {name: value for name, value in options.items() if value is not None}


def _scheme_of(
    method: str,
    bits: int | None = None,
    group_size: int = 128,
    sym: bool | None = None,
    zero_point: bool | None = None,
) -> str:
    if bits is None:
        raise InputError('bits is missing: give for example bits=4, or a scheme, "w4g128"')
    if sym is not None and zero_point is not None and sym == zero_point:
        raise InputError(f"sym={sym} and zero_point={zero_point} contradict each other: give one of them")
    if zero_point is None:
        zero_point = method == "awq" if sym is None else not sym
    return str(Scheme(bits=bits, group_size=None if group_size == -1 else group_size, zero_point=zero_point))


def _act_order_of(method: str, desc_act: bool = False, act_group_aware: bool = True) -> str:
    return "desc_act" if desc_act else "group-aware" if act_group_aware else "none"


def _format_of(given: Any) -> str:
    spelled = str(getattr(given, "value", given)).lower()
    return "awq" if spelled == "gemm" else spelled


def _texts_of(given: Any) -> Any:
    # The names of data sets that GPTQConfig takes.
    if isinstance(given, str) and given in ("wikitext2", "c4", "c4-new") and not Path(given).exists():
        raise InputError(
            f"{given!r} is what GPTQ's tools call a part of a data set: give a text file, a list of texts, "
            "or a data set by its name on the hub, such as 'Salesforce/wikitext:wikitext-2-raw-v1'"
        )
    return given


# One argument that others make up of several,
_COMPOSED: Final[dict[str, tuple[tuple[str, ...], Callable[..., str]]]] = {
    "scheme": (_SCHEME, _scheme_of),
    "act_order": (_ORDER, _act_order_of),
}
# and values that they spell otherwise.
_SPELLED: Final[dict[str, Callable[[Any], Any]]] = {"format": _format_of, "calibration": _texts_of}


class StoredConfig:
    """Mixed into transformers' class of a method: the ``quantization_config`` of a checkpoint as it stands.

    transformers' own classes drop fields (``dynamic``), refuse values, or need a package.
    """

    quant_method: str
    stored: dict[str, Any]

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Keep the fields; what qkern does not read goes to transformers' own class, and the log says why."""
        try:
            detect({"quantization_config": dict(config_dict)})
        except FormatError as error:
            logger.warning("left to transformers: %s", error)
            theirs: Callable[..., Any] = cls.__bases__[1].from_dict  # type: ignore[attr-defined]
            return theirs(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
        config = cls.__new__(cls)
        vars(config).update(copy.deepcopy(dict(config_dict)))
        config.stored = copy.deepcopy(dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a config.json has them."""
        return copy.deepcopy(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields as a config.json has them."""
        return self.to_dict()


# transformers compares the names of classes where a config is passed for a model that has one.


class AwqConfig(StoredConfig, transformers.AwqConfig):  # type: ignore[misc]
    """Of an AWQ checkpoint."""


class GPTQConfig(StoredConfig, transformers.GPTQConfig):  # type: ignore[misc]
    """Of a GPTQ checkpoint."""


class CompressedTensorsConfig(StoredConfig, transformers.CompressedTensorsConfig):  # type: ignore[misc]
    """Of a compressed-tensors checkpoint."""


class BitsAndBytesConfig(StoredConfig, transformers.BitsAndBytesConfig):  # type: ignore[misc]
    """Of a bitsandbytes checkpoint; qkern writes all, and loads those with experts in 4 or 8 bits."""


STORED: Final[dict[str, type[StoredConfig]]] = {
    "awq": AwqConfig,
    "gptq": GPTQConfig,
    "compressed-tensors": CompressedTensorsConfig,
}
"""By ``quant_method``, what qkern loads in transformers' place."""

WRITTEN: Final[dict[str, type[StoredConfig]]] = {**STORED, "bitsandbytes": BitsAndBytesConfig}
"""By ``quant_method``, what ``save_pretrained`` writes."""
