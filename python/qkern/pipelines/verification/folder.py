"""A folder of safetensors under verification: what is wrong with it, and its matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from qkern.calibration import bind_names, load_config, meta_model
from qkern.checkpoints import model_folder
from qkern.errors import FormatError, QkernError, UnsupportedError, reason_of
from qkern.models import column_weight, describe
from qkern.nn import named_linears, stored_name, unfuse_experts
from qkern.pipelines.load import COMPUTED, model_names
from qkern.pipelines.source import stored_places
from qkern.pipelines.verification.companions import check_strays, grids_of, tokenizer_of
from qkern.pipelines.verification.configuration import MARKERS, configuration_of, format_of
from qkern.pipelines.verification.layouts import LayerLayout, UnpackedLayer, parts_of, unpack
from qkern.pipelines.verification.original import Matrix
from qkern.pipelines.verification.safetensors_files import StoredTensor, read_folder, read_json_object
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qkern.nn import ExpertPart
    from qkern.pipelines.verification.configuration import Configuration
    from qkern.pipelines.verification.report import Findings

__all__ = ["LEGACY", "FolderSubject"]

LEGACY: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files that older writers described a quantization in, and its method."""
_HEAD: Final = "lm_head"
# What decides how tensors are read, and older spellings of it.
_DECIDING: Final = (
    *("bits", "group_size", "sym", "zero_point", "desc_act", "pack_dtype"),
    *("checkpoint_format", "format", "version"),
    *("dynamic", "lm_head", "modules_to_not_convert"),
)
# Between the table of a codebook and one that another device computed.
_TABLE_ERROR: Final = 1e-6
# Steps between a zero point and the mean of the codes around it.
_AROUND: Final = 0.25
# The mean of a model's weights may be off 0 by this much of their spread: of the shipped one it is 0.0006.
_OFF_CENTRE: Final = 0.025
_OLDER: Final = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A quantized layer: name in the files and in the model, layout, shape, and its tensors by part."""

    name: str
    linear: str
    layout: LayerLayout
    N: int
    K: int
    parts: dict[str, StoredTensor]

    @property
    def scheme(self) -> Scheme:
        """Its scheme."""
        if self.layout.codebook is not None:
            nested = self.layout.nested is not None
            return Scheme(
                codebook=self.layout.codebook, group_size=self.layout.group_size, double_quant=nested
            )
        return Scheme(
            bits=self.layout.bits,
            group_size=self.layout.group_size,
            zero_point=not self.layout.symmetric,
            act_bits=8 if self.layout.activations else None,
        )

    def unpacked(self) -> UnpackedLayer:
        return unpack(self.layout, self.parts, self.N, self.K)


class _Symmetric:
    """Zero points of all layers of a file that are called symmetric and have as many bits.

    Some writers took another one than the midpoint: it is one for the file, and the mean of the codes, as
    weights are 0 in the mean, is it. Where zero points alone changed, or are misread, the codes are still
    around the midpoint. What does not tell the one from the other is damage.
    """

    def __init__(self, midpoint: int) -> None:
        self._midpoint = midpoint
        self._wrong: dict[str, list[int]] = {}
        self._zeros: set[int] = set()
        self._count = self._sum = self._squares = 0

    def take(self, layer: _Layer, unpacked: UnpackedLayer) -> None:
        """Look at a layer."""
        found = np.unique(unpacked.zeros).tolist()
        self._zeros |= set(found)
        self._sum += int(unpacked.codes.sum(dtype=np.int64))
        self._squares += int(np.square(unpacked.codes, dtype=np.int32).sum(dtype=np.int64))
        self._count += unpacked.codes.size
        if found != [self._midpoint]:
            self._wrong[layer.name] = [zero for zero in found if zero != self._midpoint]

    @property
    def is_another_grid(self) -> bool:
        """Whether the file is symmetric around another zero point."""
        if not self._wrong or len(self._zeros) != 1 or not self._count:
            return False
        (zero,), mean = self._zeros, self._sum / self._count
        spread = math.sqrt(self._squares * self._count - self._sum**2) / self._count
        return abs(mean - zero) < _AROUND and abs(mean - self._midpoint) > _OFF_CENTRE * spread

    def lines(self) -> list[str]:
        """Say which layers have other zero points, in one line if that is another grid."""
        if not self.is_another_grid:
            return [
                f"{name}: zero points {zeros[:4]}, but the configuration's symmetric codes have "
                f"{self._midpoint}"
                for name, zeros in self._wrong.items()
            ]
        return [
            f"{len(self._wrong)} layers are symmetric around the zero point {min(self._zeros)} (first: "
            f"{next(iter(self._wrong))}): qkern computes with it, runtimes that expect {self._midpoint} do "
            "not"
        ]


class FolderSubject:
    """A checkpoint folder, quantized or 16-bit.

    Parameters
    ----------
    path : str or Path
        Folder or hub id.
    findings : Findings
        Takes what is wrong with files, configuration, tensors and values.

    Attributes
    ----------
    format : str or None
        Name of the format; None if it is 16-bit, or its configuration is not read.
    runtime : str
        The runtime that it is for where none is named.
    choices : dict of str to str
        Scheme of every quantized linear, by its name in the model.
    plain : Mapping
        Tensors that are not quantized, by their name in the model; read when they are asked for.
    model : PreTrainedModel or None
        The model without weights, experts as linears; None if transformers cannot build it.
    tokenizer : PreTrainedTokenizer or None
        None if there is none that is read here.
    why_not_loaded : None
        `qkern.load` reads every folder that can be verified.

    Raises
    ------
    InputError
        If there is no such folder.
    UnsupportedError
        If its format is not read here.
    """

    runtime = "torch"
    why_not_loaded: str | None = None

    def __init__(self, path: str | Path, findings: Findings) -> None:
        self.folder = model_folder(path)
        self._findings = findings
        self._tensors, problems = read_folder(self.folder)
        findings.add("files", *problems)
        findings.count("files", len({tensor.file for tensor in self._tensors.values()}))
        self.format: str | None = None
        self.tokenizer: Any = None
        self._layers: dict[str, _Layer] = {}
        self._broken: set[str] = set()
        self._plain: dict[str, StoredTensor] = {}
        self._own: dict[str, str] = {}
        self._of_layer: dict[str, list[str]] = {}
        self._grids = grids_of(self.folder, findings)
        check_strays(self.folder, (tensor.file for tensor in self._tensors.values()), findings)
        self._said = self._read_config()
        self.model = self._build_model()
        if self.model is not None:
            self._match_tensors()
            self._check_config()
            self._check_values()
            rows = self.model.get_input_embeddings().num_embeddings
            self.tokenizer = tokenizer_of(self.folder, rows, findings)

    @property
    def choices(self) -> dict[str, str]:
        """Scheme of every complete quantized linear, weights that cannot be read too."""
        return {name: str(layer.scheme) for name, layer in self._layers.items()}

    @property
    def plain(self) -> Mapping[str, Tensor]:
        """Tensors that are not quantized."""
        return _Plain(self._plain)

    # Configuration and model -----------------------------------------------------------------------------

    def _read_config(self) -> Configuration | None:
        """Return what the ``quantization_config`` says; None if there is none that can be understood."""
        config, problem = read_json_object(self.folder / "config.json")
        if problem is not None:
            self._findings.add("config", problem)
        found = config.get("quantization_config") or {}
        if not isinstance(found, dict):
            self._findings.add("config", f"quantization_config must be an object: got {found!r:.60}")
            return None
        for file, method in LEGACY.items():
            if (self.folder / file).exists():
                legacy, problem = read_json_object(self.folder / file)
                first, second = _deciding(legacy), _deciding(found)
                differing = sorted(key for key in first.keys() & second.keys() if first[key] != second[key])
                if problem is not None:
                    self._findings.add("config", problem)
                elif differing:
                    self._findings.add("config", f"{file} and config.json differ in {', '.join(differing)}")
                elif not found:
                    self._findings.add(
                        "config",
                        f"the quantization is said in {file} alone: transformers, which reads config.json, "
                        "would load random weights; qkern convert writes both",
                    )
                found = found or {"quant_method": method, **legacy}
        if found:
            self.format = self._asked(partial(format_of, found))
        return None if self.format is None else self._asked(partial(configuration_of, found, self.format))

    @property
    def _markers(self) -> tuple[str, ...]:
        return () if self.format is None else MARKERS[self.format]

    def _build_model(self) -> Any:
        try:
            config = load_config(self.folder)
            if any(f"{_HEAD}.{marker}" in self._tensors for marker in self._markers):
                config.tie_word_embeddings = False
            model = meta_model(config)
            unfuse_experts(model)
            return model
        except QkernError as error:
            if not self._findings.has("config"):
                self._findings.add("config", str(error))
            return None

    def _check_config(self) -> None:
        """Look for linears that are not quantized and that the configuration does not exclude."""
        if self._said is None:
            return
        assert self.model is not None
        inside = describe(self.model).layers + "."
        quantized = {layer.linear for layer in self._layers.values()}
        for name in named_linears(self.model):
            stored = self._plain.get(f"{name}.weight")
            if name in quantized or stored is None or not name.startswith((inside, _HEAD)):
                continue
            # A tied head is stored as the embedding; files of a bare decoder leave a prefix out.
            own = stored_name(self.model.config.model_type, name)
            spellings = (name, own, stored.name.removesuffix(".weight"))
            if all(self._said.is_excluded(spelling) is False for spelling in spellings):
                self._findings.add(
                    "config", f"{own} is 16-bit, but the configuration says that it is quantized"
                )

    # Tensors ---------------------------------------------------------------------------------------------

    def _match_tensors(self) -> None:
        """Find layers and plain tensors; enter what is missing, left over, or of another form."""
        linears = {
            name: tuple(column_weight(linear).shape) for name, linear in named_linears(self.model).items()
        }
        ends = tuple(f".{marker}" for marker in self._markers)
        layers = {
            name.removesuffix(end): None for name in self._tensors for end in ends if name.endswith(end)
        }
        if ends and not layers:
            self._findings.add(
                "tensors",
                f"no tensor's name ends in {' or '.join(ends)}, which every layer of {self.format} has",
            )
        self._own = model_names((*layers, *self._tensors), self.model)
        for key in self._tensors:
            owner = next((stem for stem in _stems(key) if stem in layers), None)
            if owner is not None:
                self._of_layer.setdefault(owner, []).append(key)
        used: set[str] = set()
        for name in layers:
            used |= self._match_layer(name, linears)
        self._match_plain(used, {f"{self._own[name]}.weight" for name in layers})

    def _match_layer(self, name: str, linears: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Enter a layer; return the names of its tensors."""
        linear = self._own[name]
        there = {key for key in self._of_layer[name] if not key.endswith(".bias")}
        self._findings.count("tensors", len(there))
        if linear not in linears:
            self._findings.add("tensors", f"{name} is quantized, but the model has no such linear")
            return there
        if self._said is None:
            return there
        if self._said.is_excluded(name):
            self._findings.add("config", f"{name} is quantized, but the configuration excludes it")
        stored = {key.removeprefix(f"{name}."): self._tensors[key] for key in there}
        layout = self._asked(partial(self._said.layout_of, name, stored))
        if layout is None:
            return there
        N, K = linears[linear]
        parts, problems = self._match_parts(name, layout, N, K, there)
        problems += self._shape_problems(name, layout, parts, N, K)
        if not problems:
            _refuse_blocks_across_rows(name, layout, K)
        self._findings.add("tensors", *problems)
        if self.model.get_submodule(linear).bias is None:
            there |= self._match_bias(name, N)
        if not problems:
            self._layers[linear] = _Layer(name=name, linear=linear, layout=layout, N=N, K=K, parts=parts)
        return there

    def _asked(self, question: Callable[[], Any]) -> Any:
        """Ask the configuration; None, and a problem, if it says nothing that can be understood."""
        try:
            return question()
        except FormatError as error:
            self._findings.add("config", str(error))
        except (AttributeError, TypeError, ValueError) as error:  # objects where lists are, and the like
            self._findings.add("config", f"quantization_config is not understood: {reason_of(error)}")
        return None

    def _match_parts(
        self, name: str, layout: LayerLayout, N: int, K: int, there: set[str]
    ) -> tuple[dict[str, StoredTensor], list[str]]:
        """Take the tensors of a layer that are what they should be; say what is wrong with the others."""
        expected = parts_of(layout, N, K)
        parts, problems = {}, []
        for part, form in expected.items():
            tensor = self._tensors.get(f"{name}.{part}")
            if tensor is None:
                problems += [f"{name}.{part} is missing"] if form.is_needed else []
            elif (tensor.dtype, tensor.shape) not in form.forms:
                problems.append(
                    f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}: {layout.bits} bits in groups of "
                    f"{layout.group_size or K} of a matrix {[N, K]} make it {form}"
                )
            else:
                parts[part] = tensor
        left_over = there - {f"{name}.{part}" for part in expected}
        return parts, problems + [f"{key} is left over: there is no use for it" for key in sorted(left_over)]

    def _match_bias(self, name: str, N: int) -> set[str]:
        """Let zeros pass as a bias that the model has not: some writers give every layer one."""
        bias = self._tensors.get(f"{name}.bias")
        if bias is None:
            return set()
        if bias.shape != (N,) or not bias.is_float or bias.floats().any():
            self._findings.add(
                "tensors", f"{bias.name} is no vector of {N} zeros, and the model's linear has no bias"
            )
        return {bias.name}

    @staticmethod
    def _shape_problems(
        name: str, layout: LayerLayout, parts: Mapping[str, StoredTensor], N: int, K: int
    ) -> list[str]:
        said = {} if layout.shape is None else {"quant_state": list(layout.shape)}
        if "weight_shape" in parts:
            said["weight_shape"] = parts["weight_shape"].array().tolist()
        return [
            f"{name}: its {part} says {shape}: the model has {[N, K]}"
            for part, shape in said.items()
            if shape != [N, K]
        ]

    def _match_plain(self, used: set[str], quantized: set[str]) -> None:
        stored = self._tensors.keys() - used
        known = stored_places(self.model, stored)
        names, missing = bind_names(self.model, known)
        places = {name: known[own] for name, own in names.items()}
        state = self.model.state_dict()
        ignored = (*COMPUTED, *(self.model._keys_to_ignore_on_load_unexpected or ()))
        spelled = partial(stored_name, self.model.config.model_type)
        problems = [f"{spelled(name)} is missing" for name in missing if name not in quantized]
        left_over = stored - {_key(place) for place in places.values()}
        problems += [
            f"{name} is left over: the model has no place for it"
            for name in sorted(left_over)
            if not any(re.search(pattern, name) for pattern in ignored)
        ]
        for name, place in places.items():
            tensor, wanted = self._tensors[_key(place)], _whole_shape(place, tuple(state[name].shape))
            if tensor.shape != wanted:
                problems.append(
                    f"{tensor.name} has the shape {list(tensor.shape)}: the model has {list(wanted)}"
                )
            elif not tensor.is_float and state[name].is_floating_point():
                problems.append(f"{tensor.name} is {tensor.dtype}: 16 or 32-bit floats are needed")
            else:
                self._plain[name] = tensor if isinstance(place, str) else _part_of(tensor, place)
        self._findings.count("tensors", len(places))
        self._findings.add("tensors", *dict.fromkeys(problems))

    # Values ----------------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        # Tied tensors once.
        for tensor in {tensor.name: tensor for tensor in self._plain.values()}.values():
            if tensor.is_float:
                broken = int((~np.isfinite(tensor.floats())).sum())
                text = f"{tensor.name} has {broken} NaN or Inf values"
                self._findings.add("values", *([text] if broken else ()))
            self._findings.count("values")
        midpoints, declared = [], []
        symmetric: dict[int, _Symmetric] = {}
        for linear, layer in list(self._layers.items()):
            unpacked = layer.unpacked()
            if layer.layout.symmetric:
                symmetric.setdefault(layer.layout.bits, _Symmetric(layer.layout.midpoint)).take(
                    layer, unpacked
                )
            self._findings.add("values", *_value_problems(layer, unpacked))
            self._findings.count("values", len(layer.parts))
            if not unpacked.has_weights:
                self._broken.add(linear)
                continue
            midpoints.append(bool((unpacked.zeros == layer.layout.midpoint).all()))
            declared.append(not layer.layout.symmetric)
            if layer.layout.symmetric or self.format == "awq":
                # What the zero points are counts, which files may have in either case.
                layout = replace(layer.layout, symmetric=midpoints[-1])
                self._layers[linear] = replace(layer, layout=layout)
        for found in symmetric.values():
            enter = self._findings.note if found.is_another_grid else self._findings.add
            enter("values", *found.lines())
        if midpoints and all(midpoints) and all(declared) and self.format != "awq":
            self._findings.add(
                "config",
                "the configuration says asymmetric, but every zero point is that of a symmetric grid",
            )

    # Matrices --------------------------------------------------------------------------------------------

    @property
    def _readable(self) -> list[str]:
        return [linear for linear in self._layers if linear not in self._broken]

    @property
    def matrices(self) -> Iterator[str]:
        """Names in the model of the quantized linears that can be read, and of matrices that were decoded."""
        yield from self._readable
        decoded = {
            tensor.name: name.removesuffix(".weight")
            for name, tensor in reversed(self._plain.items())  # of tied ones the first
            if tensor.name.removesuffix(".weight") in self._grids and len(tensor.shape) == 2
        }
        yield from decoded.values()

    def matrix(self, linear: str) -> Matrix:
        """Unpack a linear; what was decoded, from the grids that it was on, lies there as it is."""
        layer = self._layers.get(linear)
        if layer is None:
            stored = self._plain[f"{linear}.weight"]
            passed = self._grids[stored.name.removesuffix(".weight")]
            return Matrix.on(torch.from_numpy(stored.floats()), passed[-1], passed)
        unpacked = layer.unpacked()
        in_order = np.array_equal(unpacked.groups, layer.layout.group_of_columns(layer.K))
        order = None if in_order else torch.from_numpy(np.argsort(unpacked.groups, kind="stable"))
        # Scales that are rounded too change little.
        scheme = replace(layer.scheme.weight_only(), double_quant=False)
        return Matrix.on(torch.from_numpy(unpacked.weights()), scheme, self._grids.get(layer.name), order)

    def in_model(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor as the model has it, by its name there, in fp32."""
        for linear in self._readable:
            yield f"{linear}.weight", self.matrix(linear).values
        for name, tensor in self.plain.items():
            yield name, tensor.float()

    def shape(self, linear: str) -> tuple[int, int]:
        """Rows and columns of one of `matrices`."""
        layer = self._layers.get(linear)
        N, K = self._plain[f"{linear}.weight"].shape if layer is None else (layer.N, layer.K)
        return N, K


def _stems(name: str) -> Iterator[str]:
    """Yield what comes before each dot of a name, the longest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that say how tensors are read, each in one spelling; null and empty ones say nothing."""
    named = {_OLDER.get(key, key): value for key, value in config.items()}
    return {
        key: value.lower() if isinstance(value, str) else value
        for key, value in named.items()
        if key in _DECIDING and value not in (None, [], {})
    }


def _refuse_blocks_across_rows(name: str, layout: LayerLayout, K: int) -> None:
    if layout.codebook is not None and layout.group_size is not None and K % layout.group_size:
        raise UnsupportedError(
            f"{name} has blocks of {layout.group_size}, which do not divide rows of {K}: verify reads blocks "
            "that are groups of rows alone; nothing was checked"
        )


def _key(place: str | ExpertPart) -> str:
    return place if isinstance(place, str) else place.parameter


def _whole_shape(place: str | ExpertPart, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the stored tensor of which `place` is all, or one of a stack of matrices of `shape`."""
    return shape if isinstance(place, str) else (place.experts, place.parts * shape[0], *shape[1:])


def _part_of(stack: StoredTensor, place: ExpertPart) -> StoredTensor:
    """One matrix of fused experts as a tensor of its own: its rows lie together."""
    experts, rows, columns = stack.shape
    number = place.expert * place.parts + place.part
    return replace(
        stack,
        name=str(place) if place.parts == 1 else f"{place}, part {place.part}",
        shape=(rows // place.parts, columns),
        start=stack.start + number * (stack.nbytes // (experts * place.parts)),
    )


class _Plain(Mapping[str, Tensor]):
    """Tensors by name, read when they are asked for."""

    def __init__(self, stored: dict[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        if tensor.dtype == "BF16":
            return torch.from_numpy(tensor.floats()).bfloat16()
        return torch.from_numpy(np.array(tensor.array()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _value_problems(layer: _Layer, unpacked: UnpackedLayer) -> Iterator[str]:
    """Yield what is wrong with the numbers of a layer."""
    layout, name = layer.layout, layer.name
    scales, zeros, groups = unpacked.scales, unpacked.zeros, unpacked.groups
    broken = int((~np.isfinite(scales)).sum())
    if broken:
        yield f"{name}: {broken} scales are NaN or Inf"
    if groups.min(initial=0) < 0 or groups.max(initial=0) >= scales.shape[1]:
        yield (
            f"{name}: the group index runs from {groups.min()} to {groups.max()}, and there are groups 0 to "
            f"{scales.shape[1] - 1}"
        )
        return
    if not layout.act_order and not np.array_equal(groups, layout.group_of_columns(layer.K)):
        yield f"{name}: the group index is out of order, but readers ignore it: desc_act is false"
    lost = (scales == 0)[:, groups] & (unpacked.codes != zeros[:, groups])
    # A block of zeros has any codes of a table in some files.
    if unpacked.levels is None and lost.any():
        yield f"{name}: {int(lost.any(1).sum())} rows have scales of 0 for codes that are not zero"
    if layout.format == "gptq" and bool((zeros == 0).any()):
        yield f"{name}: zero points of 0, which half of the readers of GPTQ v1 take for {2 * layout.midpoint}"
    if layout.int8 and layout.bits < 8:
        values = layer.parts["weight"].array()
        if values.min(initial=0) < -layout.midpoint or values.max(initial=0) >= layout.midpoint:
            yield f"{name}: weight has values that {layout.bits} bits do not hold"
    if unpacked.levels is not None:
        table = layer.parts["weight.quant_map"].floats()
        if not np.allclose(table, unpacked.levels, rtol=0, atol=_TABLE_ERROR):
            yield f"{name}: weight.quant_map is not {layout.codebook}, with which readers compute"
    if "weight_format" in layer.parts and layer.parts["weight_format"].array().any():
        yield f"{name}: weight_format is not 0: rows are in an order that readers of files do not know"
    if layout.static:
        scale = layer.parts["input_scale"].floats().reshape(-1)
        if not bool((np.isfinite(scale) & (scale > 0)).all()):
            yield f"{name}: input_scale must be above 0 and finite: got {scale.tolist()}"
        zero = layer.parts.get("input_zero_point")
        if zero is not None and zero.array().any():
            yield f"{name}: input_zero_point must be 0, as symmetric activations have it"
