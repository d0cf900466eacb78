"""A model to work on, from a folder, the hub or memory, without its weights in memory."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qkern.calibration import Weights, bind_names, load_config, load_tokenizer, meta_copy, meta_model
from qkern.checkpoints import TensorFolder, model_folder, read_json
from qkern.errors import FormatError, InputError
from qkern.nn import expert_parts, own_name, quant_linears, stored_name, unfuse_experts
from qkern.pipelines.checks import refuse_adapters, refuse_training
from qkern.pipelines.load import COMPUTED, config_dtype, load_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from qkern.nn import ExpertPart

__all__ = ["Source", "open_source", "stored_places"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An unquantized model.

    Parameters
    ----------
    name : str
        The folder or the class, for messages and the recipe.
    model : PreTrainedModel
        Its modules, experts as linears (`unfuse_experts`), the parameters on the meta device.
    weights : Weights
        Its parameters.
    folder : Path or None
        Where config and tokenizer lie; None for a model in memory that came from no folder.
    config : dict
        What goes into config.json.
    dtype : torch.dtype or None
        What the config of a folder says that its tensors are loaded in, whatever they are stored in; None:
        as they are.
    """

    name: str
    model: Any
    weights: Weights
    folder: Path | None
    config: dict[str, Any]
    dtype: torch.dtype | None = None

    def identity(self) -> str:
        """Hash that changes when the weights may have changed.

        Of a folder its files' names, sizes, times of change and headers; of a model in memory all bytes.
        """
        digest = hashlib.sha256()
        tensors = self.weights.tensors
        if isinstance(tensors, TensorFolder):
            for path in sorted({tensors.file_of(name) for name in tensors}):
                status = path.stat()
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
                with path.open("rb") as file:
                    digest.update(file.read(int.from_bytes(file.read(8), "little")))
            return digest.hexdigest()
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return digest.hexdigest()

    def stored_name(self, name: str) -> str:
        """Name that a module or tensor has in checkpoints."""
        return stored_name(self.model.config.model_type, name)

    def stored_once(self) -> list[str]:
        """Names of all parameters and stored buffers, of tied ones the first."""
        model = self.model
        names: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in self.weights:
                names.setdefault(id(tensor), name)
        return list(names.values())

    def header(self, name: str) -> Tensor:
        """Shape and dtype of a parameter as it is stored: a tensor on the meta device."""
        stored, tensors = self.weights.names[name], self.weights.tensors
        owner = stored if isinstance(stored, str) else stored.parameter
        whole = tensors.header(owner) if isinstance(tensors, TensorFolder) else tensors[owner].to("meta")
        return whole if isinstance(stored, str) else stored.of(whole)

    def tokenizer(self) -> Any:
        """Load the tokenizer that lies beside the model.

        Raises
        ------
        InputError
            If the model came from no folder.
        FormatError
            If the folder has none.
        """
        if self.folder is None:
            raise InputError(
                f"calibration texts need a tokenizer, and {self.name} came from no folder: pass tokenizer=, "
                "or give lists of token ids"
            )
        return load_tokenizer(self.folder)


def open_source(model: Any, *, headers: bool = False) -> Source:
    """Open a model for layer-by-layer work.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        Folder with config.json and safetensors, hub id, or a model in memory, which is not modified.
    headers : bool
        Only to look at its headers: what would be fetched or loaded whole is not, and has no values.

    Raises
    ------
    InputError
        If there is no such folder, its config names no architectures, or the model is already quantized,
        has adapters, or integers for weights.
    UnsupportedError
        If layers of it are in training.
    FormatError
        If a file is damaged or a tensor is missing.
    """
    if isinstance(model, (str, Path)):
        source = _open_folder(model_folder(model, fetch=not headers), headers)
        _refuse_integers(source)
        return source
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise InputError(
            f"a model is a folder, a hub id or a transformers causal LM: got {type(model).__name__}"
        )
    source = _open_memory(model)
    _refuse_integers(source)
    return source


def _refuse_integers(source: Source) -> None:
    state = source.model.state_dict()
    for name in source.stored_once():
        dtype = source.header(name).dtype
        if state[name].is_floating_point() and not dtype.is_floating_point:
            raise InputError(
                f"{name} of {source.name} is {dtype}: weights must be floats; use the model's 16-bit files"
            )


def _open_memory(model: Any) -> Source:
    refuse_adapters(model)
    refuse_training(model)
    if quant_linears(model):
        raise InputError(
            f"{type(model).__name__} already has quantized linears: quantize the original 16-bit model"
        )
    tensors = _tensors(model)
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise InputError(f"{meta[0]} has no value (meta device): load the weights first")
    folder = Path(getattr(model, "name_or_path", "") or ".missing")
    copied = meta_copy(model)
    unfuse_experts(copied)
    if getattr(copied.config, "tie_word_embeddings", False) and not _is_tied(copied):
        copied.config.tie_word_embeddings = False
    return Source(
        name=type(model).__name__,
        model=copied,
        weights=_as_they_are(copied, tensors, "the model"),
        folder=folder if (folder / "config.json").is_file() else None,
        config=_with_architectures(copied),
    )


def _with_architectures(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    return config


def _open_folder(folder: Path, headers: bool) -> Source:
    raw = read_json(folder / "config.json")
    if not raw.get("architectures"):
        raise InputError(
            f"{folder / 'config.json'} names no architectures: a causal LM has for example "
            '"architectures": ["LlamaForCausalLM"]; add it or use the original config'
        )
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown method")
        raise InputError(f"{folder} is already quantized ({method}): quantize the original 16-bit model")
    config = load_config(folder)
    tensors = TensorFolder(folder)
    dtype = config_dtype(config)
    model = _skeleton(config)
    if _holds_own_head(model, tensors):
        logger.warning("%s ties the head to the embedding but holds another head: that one is used", folder)
        config.tie_word_embeddings = raw["tie_word_embeddings"] = False
        model = _skeleton(config)
    model.config.name_or_path = str(folder)
    names, missing = _bind(model, tensors)
    if not missing:
        weights = Weights(tensors, names, str(folder))
        _warn_of_unused(model, weights, tensors, folder)
    elif headers:
        weights = _converted_headers(folder, model, dtype)
    else:
        logger.info(
            "%s stores tensors under other names than the model (%s): loading all of it at once",
            folder,
            missing[0],
        )
        weights = _load_converted(folder, config, model)
    return Source(name=str(folder), model=model, weights=weights, folder=folder, config=raw, dtype=dtype)


def _skeleton(config: Any) -> Any:
    """`meta_model` with experts as linears."""
    model = meta_model(config)
    unfuse_experts(model)
    return model


def _bind(model: Any, tensors: TensorFolder) -> tuple[dict[str, str | ExpertPart], list[str]]:
    """`bind_names` for files with names of their own, and for those that hold the experts of a layer fused.

    Raises
    ------
    FormatError
        If files lack some weights of a layer's experts, and have others.
    """
    known = stored_places(model, tensors)
    experts = {name for parts in expert_parts(model).values() for name in parts}
    names, missing = bind_names(model, known)
    lost = [name for name in missing if name in experts]
    if 0 < len(lost) < len(experts):
        raise FormatError(
            f"{tensors.folder} does not fit its config.json: missing are {lost[:8]}; fetch it again"
        )
    return {name: known[own] for name, own in names.items()}, missing


def stored_places(model: Any, stored: Iterable[str]) -> dict[str, str | ExpertPart]:
    """Where files have what a model with experts as linears takes, by its name there, for `bind_names`."""
    known: dict[str, str | ExpertPart] = {own_name(model.config.model_type, name): name for name in stored}
    for parameter, parts in expert_parts(model).items():
        fused = known.get(parameter)
        if isinstance(fused, str):
            known |= {name: replace(part, parameter=fused) for name, part in parts.items()}
    return known


def _tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _as_they_are(model: Any, tensors: dict[str, Tensor], where: str) -> Weights:
    """Weights by the names that transformers has in memory, for a model whose experts are linears."""
    names: dict[str, str | ExpertPart] = {name: name for name in tensors}
    for parameter, parts in expert_parts(model).items():
        if names.pop(parameter, None) is not None:
            names |= parts
    return Weights(tensors, names, where)


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _holds_own_head(model: Any, tensors: TensorFolder) -> bool:
    """Whether files hold a head that differs from the embedding it is tied to; then nothing is tied."""
    if not _is_tied(model):
        return False
    tied = model.get_input_embeddings().weight
    names = (name for name, value in model.named_parameters(remove_duplicate=False) if value is tied)
    prefix = f"{model.base_model_prefix}."
    spellings = {spelling for name in names for spelling in (name, name.removeprefix(prefix), prefix + name)}
    found = sorted(spellings.intersection(tensors))
    if len(found) < 2:
        return False
    stored = [tensors[name] for name in found]
    return any(value.dtype != stored[0].dtype or not torch.equal(value, stored[0]) for value in stored[1:])


def _warn_of_unused(model: Any, weights: Weights, tensors: TensorFolder, folder: Path) -> None:
    """Name what the files hold and the model has no place for, as transformers does on loading."""
    prefix = f"{model.base_model_prefix}."
    known = set(model.state_dict()) | weights.stored()
    ignored = (*COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    unused = [
        name
        for name in tensors
        if known.isdisjoint((name, prefix + name, name.removeprefix(prefix)))
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if unused:
        logger.warning(
            "%s holds %d tensors that %s has no place for; they are left out: %s%s",
            folder,
            len(unused),
            type(model).__name__,
            ", ".join(unused[:4]),
            ", ..." if len(unused) > 4 else "",
        )


def _converted_headers(folder: Path, model: Any, dtype: torch.dtype | None) -> Weights:
    """As `_load_converted`, on the meta device."""
    tensors = {
        name: tensor.to(device="meta", dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in model.state_dict().items()
    }
    return _as_they_are(model, tensors, str(folder))


def _load_converted(folder: Path, config: Any, model: Any) -> Weights:
    """Weights of a folder whose tensors transformers renames or stacks on loading."""
    return _as_they_are(model, _tensors(load_whole(folder, config)), str(folder))
