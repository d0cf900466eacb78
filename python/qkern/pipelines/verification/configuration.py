"""What a ``quantization_config`` says: its format, and by its name about each linear.

Like `layouts` this is a second opinion: it shares nothing with `qkern.checkpoints`, and no look-up of names.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkern.errors import FormatError, UnsupportedError
from qkern.pipelines.verification.layouts import CODEBOOKS, STATE, LayerLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qkern.pipelines.verification.safetensors_files import StoredTensor

__all__ = ["MARKERS", "Configuration", "configuration_of", "format_of"]

MARKERS: Final = {
    "gptq": ("qweight",),
    "gptq_v2": ("qweight",),
    "awq": ("qweight",),
    "compressed-tensors": ("weight_scale",),
    "bitsandbytes": ("weight.quant_map", "SCB"),
}
"""By format the ends of the names of tensors of which every quantized layer has one, and no other has any."""
_HEAD: Final = "lm_head"
_REGEX: Final = "re:"
_LINEAR: Final = "Linear"
_BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# bitsandbytes has sizes in 32 bits.
_MOST: Final = (1 << 31) - 1
_LARGEST: Final = float(np.finfo(np.float32).max)
_COMPRESSED: Final = ("pack-quantized", "int-quantized", "mixed-precision")
_NUMBERS: Final = ("weights", "input_activations", "output_activations")


def format_of(config: Mapping[str, Any]) -> str:
    """Name of the format that a ``quantization_config`` describes.

    Raises
    ------
    FormatError
        If it names none.
    UnsupportedError
        If it is another than these.
    """
    method = config.get("quant_method")
    if not isinstance(method, str):
        raise FormatError(f"quantization_config must name its quant_method: got {method!r:.60}")
    version = config.get("checkpoint_format") or config.get("format")
    if method == "gptq" and version in (None, "gptq", "gptq_v2"):
        return version or "gptq"
    if method == "awq" and str(config.get("version", "gemm")).lower() == "gemm":
        return "awq"
    if method == "bitsandbytes":
        return method
    others = _other_forms(config)
    if method == "compressed-tensors" and not others:
        return "compressed-tensors"
    named = ", ".join(others) if method == "compressed-tensors" else version or config.get("version")
    raise UnsupportedError(
        f"verify does not read quant_method {method!r}, format {named!r}: it reads gptq, gptq_v2, awq "
        "(gemm), bitsandbytes, and compressed-tensors with integers (pack-quantized and int-quantized); "
        "nothing was checked"
    )


def _other_forms(config: Mapping[str, Any]) -> list[str]:
    """Name what a configuration of compressed-tensors has of formats and numbers that are not read here."""
    groups = config.get("config_groups")
    parts = (
        [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    )
    formats = [part.get("format") for part in (config, *parts)]
    numbers = [part[key].get("type") for part in parts for key in _NUMBERS if isinstance(part.get(key), dict)]
    every = dict.fromkeys(map(str, (*formats, *numbers)))
    return [found for found in every if found not in ("None", "int", *_COMPRESSED)]


def configuration_of(config: Mapping[str, Any], format: str) -> Configuration:
    """Understand a ``quantization_config``.

    Parameters
    ----------
    config : mapping
        The configuration.
    format : str
        Its `format_of`.

    Raises
    ------
    FormatError
        If it says nothing that can be.
    """
    return _OF_FORMAT[format](config, format)


class Configuration(ABC):
    """A ``quantization_config``, asked about linears by their names; of a format each subclass."""

    def __init__(self, config: Mapping[str, Any], format: str) -> None:
        self._config = config
        self._format = format

    def layout_of(self, name: str, parts: Mapping[str, StoredTensor]) -> LayerLayout:
        """Read what is said about the quantized layer `name`.

        Parameters
        ----------
        name : str
            Its name.
        parts : mapping
            Its tensors by the ends of their names, among which it may say more.

        Raises
        ------
        FormatError
            If it is nothing that can be.
        """
        fields = self._fields(name, parts)
        size = fields["group_size"]
        fields["group_size"] = size = None if size == -1 else size
        allowed = (4,) if self._format == "awq" else (2, 3, 4, 8)
        if type(fields["bits"]) is not int or fields["bits"] not in allowed:
            raise FormatError(f"{name}: bits {fields['bits']!r} cannot be in {self._format}")
        if size is not None and (type(size) is not int or size < 1):
            raise FormatError(f"{name}: group_size must be -1 or positive: got {size!r}")
        for key in ("symmetric", "act_order"):
            if not isinstance(fields.get(key, False), bool):
                raise FormatError(f"{name}: {key} must be true or false: got {fields[key]!r}")
        return LayerLayout(format=self._format, **fields)

    @abstractmethod
    def is_excluded(self, name: str) -> bool | None:
        """Whether readers are told to take the linear for 16-bit; None where nothing is told either way."""

    @abstractmethod
    def _fields(self, name: str, parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
        """Fields of `LayerLayout`; of bits and groups what is said, unchecked."""


class _Gptq(Configuration):
    def __init__(self, config: Mapping[str, Any], format: str) -> None:
        super().__init__(config, format)
        self._dynamic = config.get("dynamic") or {}
        self._first = _Patterns((re.sub(r"^[+-]:", "", key), key) for key in self._dynamic)

    def _fields(self, name: str, parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
        # The first pattern that matches counts; its sign says what it is for.
        merged = {**self._config, **(self._dynamic.get(self._first(name)) or {})}
        return {
            "bits": merged.get("bits"),
            "group_size": merged.get("group_size", -1),
            "symmetric": merged.get("sym", True),
            "act_order": merged.get("desc_act", False),
        }

    def is_excluded(self, name: str) -> bool | None:
        key = self._first(name)
        if key is not None:
            return str(key).startswith("-:")
        return not self._config.get("lm_head", False) if name == _HEAD else None


class _Awq(Configuration):
    def __init__(self, config: Mapping[str, Any], format: str) -> None:
        super().__init__(config, format)
        skipped = config.get("modules_to_not_convert")
        self._skipped = None if skipped is None else set(map(str, skipped))
        self._lengths = set(map(len, self._skipped or ()))

    def _fields(self, name: str, parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
        config = self._config
        return {
            "bits": config.get("bits", config.get("w_bit")),
            "group_size": config.get("group_size", config.get("q_group_size")),
            # Files have zero points in either case; where they are all the midpoint, the layer is symmetric.
            "symmetric": not config.get("zero_point", True),
        }

    def is_excluded(self, name: str) -> bool | None:
        if self._skipped is None:
            return None
        # What is listed is left out wherever it is in a name; the head, whether it is listed or not.
        parts = (name[start : start + n] for n in self._lengths for start in range(len(name) - n + 1))
        return any(part in self._skipped for part in parts) or (None if name == _HEAD else False)


class _CompressedTensors(Configuration):
    def __init__(self, config: Mapping[str, Any], format: str) -> None:
        super().__init__(config, format)
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise FormatError("quantization_config has no config_groups")
        if not all(isinstance(group, dict) for group in groups.values()):
            raise FormatError("quantization_config has config_groups that are no objects")
        targets = [(str(target), group) for group in groups.values() for target in group.get("targets") or ()]
        # A module's name may have no dot, but begins small.
        classes = [entry for entry in targets if re.fullmatch(r"[A-Z]\w*", entry[0])]
        classes.sort(key=lambda entry: entry[0] != _LINEAR)
        self._targeted = _Listed(targets)
        self._by_class = classes[0][1] if classes else None
        self._has_linears = any(target == _LINEAR for target, _ in classes)
        self._ignored = _Listed((str(entry), {}) for entry in config.get("ignore") or ())

    def _fields(self, name: str, parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
        # A name comes before a pattern, and both before a class.
        group = self._targeted(name)
        group = self._by_class if group is None else group
        if group is None:
            raise FormatError(f"{name} is quantized, but no config group targets it")
        weights = group.get("weights") or {}
        inputs = group.get("input_activations")
        grouped = (
            weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        ) == "group"
        return {
            "bits": weights.get("num_bits"),
            "group_size": weights.get("group_size") if grouped else None,
            "symmetric": weights.get("symmetric", True),
            "act_order": weights.get("actorder") == "group",
            "int8": (group.get("format") or self._config.get("format")) == "int-quantized",
            "activations": inputs is not None,
            "static": inputs is not None and not inputs.get("dynamic", False),
        }

    def is_excluded(self, name: str) -> bool | None:
        return self._ignored(name) is not None or not (self._has_linears or self._targeted(name) is not None)


class _Bitsandbytes(Configuration):
    # Where transformers lets the name of a skipped module end.
    _END: Final = r"(?:(?<=\.)|(?=\.|$))"

    def __init__(self, config: Mapping[str, Any], format: str) -> None:
        super().__init__(config, format)
        self._loads = {bits: config.get(f"load_in_{bits}bit", False) for bits in (4, 8)}
        skipped = config.get("llm_int8_skip_modules")
        self._skips_head = skipped is None
        skipped = list(map(str, skipped or ()))
        # Of plain names, which are patterns too, the dots are taken for what they are meant as.
        self._names = {entry for entry in skipped if re.fullmatch(r"[\w.-]*", entry)}
        self._first = _Patterns(
            (f"(?:{entry}){self._END}", True) for entry in skipped if entry not in self._names
        )

    def _fields(self, name: str, parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
        int8 = "SCB" in parts
        bits = 8 if int8 else 4
        if any(said is not (which == bits) for which, said in self._loads.items()):
            four, eight = self._loads.values()
            raise FormatError(
                f"{name} has {bits} bits, but load_in_4bit is {four!r} and load_in_8bit is {eight!r}"
            )
        if int8:
            return {"bits": 8, "group_size": None, "symmetric": True, "activations": True}
        found = [part for part in parts if part.startswith(STATE)]
        if len(found) != 1:
            raise FormatError(f"{name} has {len(found)} tensors {STATE}*, which say what it is: 1 is needed")
        return _read_state(f"{name}.{found[0]}", parts[found[0]])

    def is_excluded(self, name: str) -> bool | None:
        ends = [end for match in re.finditer(r"\.|$", name) for end in match.span()]
        if any(name[:end] in self._names for end in ends) or self._first(name):
            return True
        if any(name[start:] in self._names for start in range(len(name) + 1)):
            return True
        # In transformers the experts of a layer are no linears, which alone are quantized.
        return None if ".experts." in name or (name == _HEAD and self._skips_head) else False


def _read_state(name: str, tensor: StoredTensor) -> dict[str, Any]:
    """Fields of a layer that says itself what it is."""
    try:
        state = json.loads(tensor.array().tobytes())
        kind, block, (N, K) = state["quant_type"], state["blocksize"], state["shape"]
        nested = (state["nested_blocksize"], state["nested_offset"]) if "nested_offset" in state else None
        numbers = (block, N, K, *(nested or ())[:1])
        is_sound = all(type(number) is int and 0 < number <= _MOST for number in numbers)
        is_sound &= name.endswith(STATE + kind) and kind in CODEBOOKS and block in _BLOCKS
        is_sound &= nested is None or (type(nested[1]) is float and abs(nested[1]) <= _LARGEST)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{name} is no JSON of a quantized layer: {type(error).__name__}: {error}"
        ) from None
    if not is_sound:
        raise FormatError(f"{name} says what cannot be: {state}")
    return {
        "bits": 4,
        "group_size": block,
        "symmetric": True,
        "codebook": kind,
        "nested": nested,
        "shape": (N, K),
        "state_bytes": tensor.nbytes,
    }


class _Patterns:
    """What belongs to the first of many patterns that matches the start of a name.

    Files have one for each of thousands of layers: those that spell a whole name are looked up by it.
    """

    def __init__(self, entries: Iterable[tuple[str, Any]]) -> None:
        self._spelled: dict[str, tuple[float, Any]] = {}
        self._others: list[tuple[int, re.Pattern[str], Any]] = []
        for place, (pattern, value) in enumerate(entries):
            name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
            if pattern.removeprefix("^") == f"{re.escape(name)}$":
                self._spelled.setdefault(name, (place, value))
                continue
            try:
                self._others.append((place, re.compile(pattern), value))
            except re.error as error:
                raise FormatError(
                    f"quantization_config: {pattern!r} is no regular expression: {error}"
                ) from None

    def __call__(self, name: str) -> Any:
        before, found = self._spelled.get(name, (math.inf, None))
        earlier = (v for place, pattern, v in self._others if place < before and pattern.match(name))
        return next(earlier, found)


class _Listed:
    """What belongs to the targets, or ignored entries, of compressed-tensors: names, then patterns."""

    def __init__(self, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        listed = list(entries)
        self._names = dict(reversed(listed))
        self._first = _Patterns(
            (entry.removeprefix(_REGEX), value) for entry, value in listed if entry.startswith(_REGEX)
        )

    def __call__(self, name: str) -> Mapping[str, Any] | None:
        matched: Mapping[str, Any] | None = self._first(name)
        return self._names.get(name, matched)


_OF_FORMAT: Final[dict[str, type[Configuration]]] = {
    "gptq": _Gptq,
    "gptq_v2": _Gptq,
    "awq": _Awq,
    "compressed-tensors": _CompressedTensors,
    "bitsandbytes": _Bitsandbytes,
}
