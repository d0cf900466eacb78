"""From a checkpoint folder to a transformers model whose quantized linears are `QuantLinear`."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from qkern.calibration import load_config, load_tokenizer, meta_model
from qkern.checkpoints import QuantizedCheckpoint, model_folder, read_json
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.gguf import read_tokenizer
from qkern.gguf.checkpoint import GGUFCheckpoint
from qkern.models import column_weight, describe, fuse_forwards
from qkern.nn import (
    OutlierLinear,
    QuantEmbedding,
    QuantLinear,
    TiedHead,
    as_linears,
    expert_parameters,
    expert_parts,
    named_linears,
    own_name,
    replace_linears,
    unfuse_experts,
)
from qkern.nn.naming import bind_save
from qkern.nn.state import QuantModule, form_of, weight_of
from qkern.pipelines.checks import choose_targets, log_kept, target_names
from qkern.pipelines.save import save
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "COMPUTED",
    "HEAD",
    "config_dtype",
    "is_gguf",
    "load",
    "load_whole",
    "load_with_tokenizer",
    "mark_quantized",
    "model_names",
    "refuse_misfits",
    "save_as_quantized",
    "unmark_quantized",
    "usable_device",
]

logger = logging.getLogger(__name__)

Checkpoint: TypeAlias = QuantizedCheckpoint | GGUFCheckpoint

HEAD: Final = "lm_head"
# Buffers that older files hold and models compute themselves.
COMPUTED: Final = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    compute: str | None = None,
    int8: bool = False,
) -> Any:
    """Load a causal LM from a GPTQ, AWQ, compressed-tensors, bitsandbytes or 16-bit folder, or a GGUF file.

    Of a GGUF (Llama, Mistral, Qwen2, Qwen3) matrices in Q4_0, Q4_1 and Q8_0 stay as they are, bit for bit;
    those of other types are decoded, and the log says how many.

    Parameters
    ----------
    path : str or Path
        Folder, or a hub id, or a ``.gguf`` file (of a split one any part).
    dtype : torch.dtype, str or None
        Dtype of everything that is not quantized, ``"bfloat16"`` for example; None or ``"auto"``: the one
        that config.json names, and fp32 for a GGUF, which names none. Scales are never cast.
    device : torch.device or str
        Where the model goes; ``"auto"`` is a GPU where torch has CUDA, else the CPU.
    compute : str or None
        ``"auto"``, ``"float"`` or ``"int8"`` for every `QuantLinear`; None leaves them at ``"auto"``.
    int8 : bool
        LLM.int8() of a 16-bit folder: the linears of the decoder layers, those of experts too but no
        routers, become `OutlierLinear`; the head stays as it is. The whole model is read in 16 bits first,
        so the peak of memory is that model.

    Returns
    -------
    PreTrainedModel
        In evaluation mode. The parameters of a quantized checkpoint are frozen.

    Raises
    ------
    InputError
        If the folder or its architectures are missing, or an argument is not understood.
    FormatError
        If a file is damaged, a tensor is missing or left over or has NaN or Inf, or the format is not read.
    UnsupportedError
        If the architecture or a tensor type of a GGUF is not read, or `int8` meets experts in 3-D parameters
        that `qkern.nn.unfuse_experts` does not know.
    """
    if compute not in (None, "auto", "float", "int8"):
        raise InputError(f"unknown compute: got {compute!r}, allowed are 'auto', 'float' and 'int8'")
    dtype = _usable_dtype(dtype)
    device = usable_device(device)
    checkpoint: Checkpoint
    if int8 and is_gguf(path):
        raise _quantized_already(path, "a GGUF file")
    if is_gguf(path):
        with GGUFCheckpoint(path) as checkpoint:
            try:
                model = _load_quantized(checkpoint, checkpoint.transformers_config(), dtype)
            except InputError as error:  # of what the caller gave, the path was the last to be looked at
                raise FormatError(f"{checkpoint.folder}: {error}") from error
    else:
        with QuantizedCheckpoint(path) as checkpoint:
            config = _read_config(checkpoint)
            if checkpoint.format is None:
                _refuse_integers(checkpoint)
                model = load_whole(checkpoint.folder, config, dtype)
                if int8:
                    _replace_by_outlier_linears(model)
            elif int8:
                raise _quantized_already(path, checkpoint.format.name)
            else:
                model = _load_quantized(checkpoint, config, dtype)
    refuse_nonfinite(checkpoint.folder, model)
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            module.compute = compute or "auto"
    fuse_forwards(model)
    return model.eval().to(device)


def _quantized_already(path: str | Path, what: str) -> InputError:
    return InputError(
        f"int8=True quantizes a 16-bit folder: {path} is {what}; load it as it is, without int8"
    )


def _replace_by_outlier_linears(model: Any) -> None:
    unfuse_experts(model)
    stacks = expert_parameters(model)
    if stacks:
        raise UnsupportedError(
            f"stacks of experts that cannot become linears have no OutlierLinear: {', '.join(stacks[:4])}; "
            "load the model without int8"
        )
    structure = describe(model)
    targets = choose_targets(model, structure, (), ())
    names = target_names(structure, targets)
    log_kept(model, names, targets)
    replace_linears(model, dict.fromkeys(names, "w8a8"), kind=OutlierLinear)
    model.requires_grad_(False)
    save_as_quantized(model)
    mark_quantized(model)


def load_with_tokenizer(path: str | Path, **options: Any) -> tuple[Any, Any]:
    """Model, loaded by `load` with its options, and tokenizer of a folder, hub id or GGUF file."""
    # The model first: its errors say what is wrong with a folder.
    if is_gguf(path):
        return load(path, **options), read_tokenizer(path)
    folder = model_folder(path)
    return load(folder, **options), load_tokenizer(folder)


def is_gguf(path: str | Path) -> bool:
    """Whether a model is named that is a GGUF file, there or not.

    Raises
    ------
    InputError
        If it is no name.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        what = "an empty name" if isinstance(path, str) else type(path).__name__
        raise InputError(f"a model is a folder, a hub id or a GGUF file: got {what}")
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


def usable_device(device: torch.device | str) -> torch.device:
    """Return the device of that name, once something could be put on it.

    Raises
    ------
    InputError
        If torch does not know it or cannot use it here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); allowed are auto, "
            "cpu, and cuda, cuda:N or mps where torch has them: use auto or cpu"
        ) from error


def _refuse_integers(checkpoint: QuantizedCheckpoint) -> None:
    """Refuse codes without scales, which transformers would take for weights."""
    tensors = checkpoint.tensors
    integers = [
        name
        for name in tensors
        if name.endswith(".weight") and not tensors.header(name).dtype.is_floating_point
    ]
    refuse_misfits(checkpoint.folder, integers=integers)


def _usable_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    named: dict[Any, Any] = {str(known).removeprefix("torch."): known for known in FLOAT_DTYPES}
    found = {"auto": None, **named}.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in (None, *FLOAT_DTYPES):
        raise InputError(
            f"unknown dtype: got {dtype!r}, allowed are {', '.join(map(str, FLOAT_DTYPES))}, their names "
            "and, for that of config.json, 'auto' or None"
        )
    return found


def _read_config(checkpoint: QuantizedCheckpoint) -> Any:
    file = checkpoint.folder / "config.json"
    if not checkpoint.config.get("architectures"):
        raise InputError(
            f"{file} names no architectures: a causal LM has for example "
            '"architectures": ["LlamaForCausalLM"]; add it or use the original config'
        )
    config = load_config(checkpoint.folder)
    # The model below is no transformers-quantized one; leaving the mark would make it claim so.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if HEAD in checkpoint.entries:
        config.tie_word_embeddings = False
    return config


def load_whole(folder: Path, config: Any, dtype: torch.dtype | None = None) -> Any:
    """Load a 16-bit folder through transformers, which knows the names and stackings of every architecture.

    Raises
    ------
    FormatError
        If a tensor is missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _transformers_hushed():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by name below, which transformers' own error is not
                use_safetensors=True,
            )
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise FormatError(f"{folder} cannot be loaded: {error}") from error
    mismatched = [str(entry[0]) for entry in info["mismatched_keys"]]
    refuse_misfits(
        folder, missing=info["missing_keys"], left_over=info["unexpected_keys"], mismatched=mismatched
    )
    return model


@contextmanager
def _transformers_hushed() -> Iterator[None]:
    """No bar of transformers, and no report of what did not fit: that becomes an error."""
    from transformers.utils import logging as theirs

    reporter = logging.getLogger("transformers.modeling_utils")
    # Its public switch would switch the hub's bars too, and switch them on when they were off before.
    shown = theirs._tqdm_active
    theirs._tqdm_active = False
    reporter.addFilter(_no_report)
    try:
        yield
    finally:
        reporter.removeFilter(_no_report)
        theirs._tqdm_active = shown


def _no_report(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    # Failed conversions are explained nowhere else.
    return "LOAD REPORT" not in text or "CONVERSION" in text


def refuse_misfits(
    folder: Path | str,
    *,
    missing: Iterable[str] = (),
    left_over: Iterable[str] = (),
    mismatched: Iterable[str] = (),
    integers: Iterable[str] = (),
) -> None:
    """Raise FormatError when any name is given; a model with random weights is never returned."""
    problems = []
    for what, names in (
        ("missing", missing),
        ("left over", left_over),
        ("of another shape", mismatched),
        ("integers in the place of floats, as codes without scales are", integers),
    ):
        listed = sorted(names)
        if listed:
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            problems.append(f"{what}: {', '.join(listed[:8])}{more}")
    if problems:
        raise FormatError(
            f"{folder} does not fit its config.json: {'; '.join(problems)}; the files are incomplete or "
            "belong to another config: fetch them again"
        )


def refuse_nonfinite(source: object, model: Any) -> None:
    """Refuse a model with NaN or Inf in what is not quantized, which reading does not look at.

    Raises
    ------
    FormatError
        Naming the first such parameter and `source`.
    """
    for name, parameter in model.named_parameters():
        # The sum of finite values may overflow, but it is quick, and only then is each looked at.
        if not parameter.detach().sum(dtype=torch.float32).isfinite() and not parameter.isfinite().all():
            raise FormatError(
                f"{source}: {name} has NaN or Inf values, with which every output would be NaN; "
                "fetch the checkpoint again"
            )


def _load_quantized(checkpoint: Checkpoint, config: Any, dtype: torch.dtype | None) -> Any:
    dtype = dtype or _stored_dtype(checkpoint, config)
    config.dtype = dtype
    model = meta_model(config)
    unfuse_experts(model)
    model.config.dtype = dtype
    model.config.name_or_path = str(checkpoint.folder)
    names = model_names(checkpoint, model)
    if isinstance(checkpoint, GGUFCheckpoint):
        _replace_embedding(checkpoint, model, dtype)
    biases = _replace_layers(checkpoint, model, names, dtype)
    _fill(checkpoint, model, [name for name in checkpoint.plain if name not in biases], names, dtype)
    _read_generation_config(checkpoint, model)
    save_as_quantized(model)
    mark_quantized(model)
    return model


def save_as_quantized(model: Any) -> None:
    """Let ``save_pretrained`` be ours: transformers' writes buffers of `QuantLinear`, which nothing reads."""
    bind_save(model, save_pretrained)


def mark_quantized(model: Any) -> None:
    """Tell libraries for training that the weights are low-bit codes; PEFT then checkpoints activations."""
    # The only mark that all of them ask for. That of 4 bits makes transformers import bitsandbytes.
    model.is_loaded_in_8bit = True


def unmark_quantized(model: Any) -> None:
    """Take from a model that is dense by now whatever says otherwise."""
    model.is_loaded_in_8bit = False
    vars(model).pop("save_pretrained", None)
    quantizer = getattr(model, "hf_quantizer", None)  # of transformers' from_pretrained
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def save_pretrained(
    self: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> None:
    """Write a loaded quantized model with `qkern.save`, in the place of transformers' method.

    That one writes what `qkern.save` does not: the adapters alone of a model that has some by
    ``add_adapter``, and a model that has no quantized layers any more, which may be in training.

    Raises
    ------
    InputError
        On options of transformers' method that have no meaning here, and as `qkern.save` does.
    """
    has_codes = any(isinstance(module, QuantModule) for module in self.modules())
    if getattr(self, "_hf_peft_config_loaded", False) or not has_codes:
        theirs = type(self).save_pretrained
        theirs(self, save_directory, is_main_process, max_shard_size=max_shard_size, **options)
        return
    extra = sorted(name for name, value in options.items() if value and name != "safe_serialization")
    if extra:
        raise InputError(
            f"save_pretrained of a model with QuantLinear takes save_directory and max_shard_size: got "
            f"{', '.join(extra)}; use qkern.save"
        )
    if is_main_process:
        save(self, save_directory, max_shard_size=max_shard_size)


def config_dtype(config: Any) -> torch.dtype | None:
    """Dtype that a config names for all its floating-point tensors, if it is one that qkern computes in."""
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    return named if named in FLOAT_DTYPES else None


def _stored_dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    named = config_dtype(config)
    if named is not None:
        return named
    for name in checkpoint.plain:
        if (found := checkpoint.tensors[name].dtype) in FLOAT_DTYPES:
            return found
    return torch.float16


def model_names(stored: Iterable[str], model: Any) -> dict[str, str]:
    """Map each name of a checkpoint to the model's; files of a bare decoder leave the base prefix out."""
    known = {*model.state_dict(), *(name for name, _ in model.named_modules()), *expert_parts(model)}
    prefix = f"{model.base_model_prefix}."
    own = {name: own_name(model.config.model_type, name) for name in stored}
    return {
        name: prefix + mine if mine not in known and prefix + mine in known else mine
        for name, mine in own.items()
    }


def _replace_embedding(checkpoint: GGUFCheckpoint, model: Any, dtype: torch.dtype) -> None:
    """Put a `QuantEmbedding` where the file has a quantized table; a tied head shares it."""
    if checkpoint.embedding is None:
        return
    table = QuantEmbedding.from_quantized(checkpoint.weight(checkpoint.embedding), dtype=dtype)
    model.set_submodule(checkpoint.embedding, table)
    if model.config.tie_word_embeddings:
        model.set_submodule(HEAD, TiedHead(table))


def _replace_layers(
    checkpoint: Checkpoint, model: Any, names: dict[str, str], dtype: torch.dtype
) -> set[str]:
    """Put a `QuantLinear` where the checkpoint has a quantized layer; return the names of biases used."""
    linears = named_linears(model)
    refuse_misfits(
        checkpoint.folder, left_over=[name for name in checkpoint.entries if names[name] not in linears]
    )
    missing, mismatched, biases = [], [], set()
    for name in checkpoint.entries:
        linear = linears[names[name]]
        qw = checkpoint.weight(name)
        if qw.shape != column_weight(linear).shape:
            mismatched.append(name)
            continue
        bias = checkpoint.tensors.get(f"{name}.bias")
        if bias is not None:
            biases.add(f"{name}.bias")
            bias = bias.to(dtype)
            if bias.shape != (qw.N,):
                mismatched.append(f"{name}.bias")
                continue
        elif linear.bias is not None:
            missing.append(f"{name}.bias")
        model.set_submodule(names[name], _make_linear(checkpoint, name, _copied(qw), bias, dtype))
    refuse_misfits(checkpoint.folder, missing=missing, mismatched=mismatched)
    return biases


def _make_linear(
    checkpoint: Checkpoint, name: str, qw: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
) -> QuantLinear:
    threshold = checkpoint.entries[name].threshold if isinstance(checkpoint, QuantizedCheckpoint) else None
    if threshold is None:
        return QuantLinear.from_quantized(qw, bias, dtype)
    return OutlierLinear.from_quantized(qw, bias, dtype, threshold=threshold)


def _copied(qw: QuantizedWeight) -> QuantizedWeight:
    """Copy the tensors: what safetensors returns is a view of the file, which may change later."""
    form = {name: None if part is None else part.clone() for name, part in form_of(qw).items()}
    return weight_of(form, qw.shape, qw.scheme)


def _fill(
    checkpoint: Checkpoint, model: Any, plain: list[str], names: dict[str, str], dtype: torch.dtype
) -> None:
    """Give every parameter and persistent buffer that is not quantized its stored value."""
    quantized = {name for name, part in model.named_modules() if isinstance(part, QuantModule)}
    slots = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if quantized.isdisjoint(accumulate(name.split("."), "{}.{}".format))
    }
    ties: dict[int, list[str]] = {}
    for name, tensor in slots.items():
        ties.setdefault(id(tensor), []).append(name)
    ignored = [*COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    filled: dict[str, Tensor] = {}
    left_over, mismatched, integers = [], [], []
    fused = expert_parts(model)
    for stored in plain:
        if names[stored] not in slots and names[stored] not in fused:
            left_over.append(stored)
            continue
        for name, tensor in as_linears(names[stored], checkpoint.tensors[stored], fused).items():
            if name not in slots or name in filled:
                left_over.append(stored)
            elif tensor.shape != slots[name].shape:
                mismatched.append(stored)
            elif slots[name].is_floating_point() and not tensor.is_floating_point():
                integers.append(stored)
            else:
                # Copied, as the quantized layers are.
                filled[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    left_over = [name for name in left_over if not any(re.search(each, names[name]) for each in ignored)]
    missing = [
        name
        for name, tensor in slots.items()
        if name not in filled and not any(other in filled for other in ties[id(tensor)])
    ]
    refuse_misfits(
        checkpoint.folder, missing=missing, left_over=left_over, mismatched=mismatched, integers=integers
    )
    for members in ties.values():
        _assign(model, members, filled)


def _assign(model: Any, members: list[str], filled: dict[str, Tensor]) -> None:
    """Set the slots `members`, which are one tensor in the model, from what the file has of them."""
    source = next(name for name in members if name in filled)
    shared = _as_slot(model, source, filled[source])
    for name in members:
        value = shared
        if name != source and name in filled and not torch.equal(filled[name], filled[source]):
            logger.warning(
                "%s and %s differ in the file although config.json ties them: kept apart", source, name
            )
            value = _as_slot(model, name, filled[name])
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)


def _as_slot(model: Any, name: str, tensor: Tensor) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    if leaf in model.get_submodule(owner)._parameters:
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


def _read_generation_config(checkpoint: Checkpoint, model: Any) -> None:
    file = checkpoint.folder / "generation_config.json"
    if not file.exists():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_dict(read_json(file))
    except (ValueError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise FormatError(f"{file} is no generation config that transformers reads: {error}") from error
