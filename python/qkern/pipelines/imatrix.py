"""The verb `imatrix`, and what an export does with an importance matrix."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkern import _progress
from qkern.calibration import LayerStream
from qkern.checkpoints import model_folder, read_json
from qkern.errors import InputError, UnsupportedError
from qkern.gguf.imatrix import Imatrix, ImatrixEntry, check_imatrix_output, write_imatrix
from qkern.models import describe
from qkern.nn import role
from qkern.pipelines.calibration import calibration_ids
from qkern.pipelines.checks import checked_architecture
from qkern.pipelines.load import usable_device
from qkern.pipelines.source import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from qkern.gguf import PlannedTensor

__all__ = ["ImatrixRun", "dataset_of", "imatrix", "is_weighed", "squares", "with_importance"]

logger = logging.getLogger(__name__)

_HEAD: Final = "output.weight"


def imatrix(
    model: Any,
    *,
    calibration: Any,
    output: str | Path | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    process_output: bool = False,
    tokenizer: Any = None,
    device: str = "auto",
) -> Imatrix:
    """Sum the squared activations that reach each column of every linear, one decoder layer at a time.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        Folder with config.json and safetensors, hub id, or a model in memory; 16-bit, of an architecture
        that is exported to GGUF.
    calibration
        Source of texts as in `qkern.calibration.load_texts`, or token ids int64 ``[S, T]``.
    output : str or Path, optional
        File to write: ``.gguf``, or ``.dat`` for llama.cpp's old form.
    samples, length, seed : int
        Calibration sequences, tokens in each (at most what the model takes), seed of the draw.
    process_output : bool
        An entry for the output head too, which llama.cpp's tool leaves out unless it is asked.
    tokenizer : optional
        For calibration texts, when `model` is in memory.
    device : str
        Where layers are computed: ``"auto"`` (CUDA if there is one, else CPU) or a torch device.

    Returns
    -------
    Imatrix
        What was collected.

    Raises
    ------
    InputError
        On arguments, texts or weights that cannot be used; nothing is written.
    UnsupportedError
        If the architecture is not exported to GGUF, or computes in a way that is not followed.

    Notes
    -----
    Counts are of tokens, experts each have their own, and routers have entries although they are never
    quantized: all as llama.cpp's tool has it. That tool also puts a BOS in the place of the first token of
    each sequence, where the model has one; here sequences are what the calibration of every method reads.
    """
    path = None if output is None else Path(output)
    if path is not None:
        check_imatrix_output(path)
    run = ImatrixRun(
        model,
        calibration,
        samples=samples,
        length=length,
        seed=seed,
        process_output=process_output,
        tokenizer=tokenizer,
        device=device,
    )
    result = run.collect()
    if path is not None:
        write_imatrix(path, result)
    return result


class ImatrixRun:
    """A model and the texts that will run through it, all that can be refused before them looked at.

    Parameters and errors are those of `imatrix`.
    """

    def __init__(
        self,
        model: Any,
        calibration: Any,
        *,
        samples: int,
        length: int,
        seed: int,
        device: str,
        process_output: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.device = usable_device(device)
        if isinstance(model, (str, Path)):  # a folder can be told without being opened
            checked_architecture(read_json(model_folder(model) / "config.json").get("model_type"))
        self.source = source = open_source(model)
        self.names = _Names(source.model.config)
        self.structure = describe(source.model)
        self.process_output = process_output
        if process_output and (self.structure.head is None or self.structure.tied):
            raise InputError(
                f"the output head of {source.name} is its embedding: GGUF has no {_HEAD} of it to process"
            )
        self.dataset = dataset_of(calibration)
        self.ids = calibration_ids(source, calibration, tokenizer, samples, length, seed)

    def collect(self) -> Imatrix:
        """Run every layer once and take down what its matrices see.

        Raises
        ------
        InputError
            If weights or activations are NaN or Inf.
        UnsupportedError
            If a matrix is multiplied in a way that is not followed.
        """
        model, count = self.source.model, self.structure.count
        stream = LayerStream(
            model, self.structure.layers, self.source.weights, head=self.structure.head, device=self.device
        )
        stream.embed(self.ids)
        entries: dict[str, ImatrixEntry] = {}
        with _progress.task("imatrix", total=count, unit="layer") as progress:
            for index in range(count):
                with stream.layer(index) as layer:
                    products = _Products(layer)
                    with products:
                        stream.advance(index)
                for name, parts in products.stacks().items():
                    full = f"{stream.prefix(index)}{name}"
                    sums = torch.stack([products.sums[part] for part in parts])
                    counts = torch.tensor([products.counts[part] for part in parts])
                    entries[self.names.of(full)] = _entry(full, sums, counts)
                progress.advance()
        if self.process_output:
            entries[_HEAD] = _head_entry(stream)
        return Imatrix(
            entries=entries,
            datasets=(self.dataset,),
            chunk_count=len(self.ids),
            chunk_size=self.ids.shape[1],
        )


def dataset_of(calibration: Any) -> str:
    """Name of the text; of a file its last part: where it lies is nobody else's business."""
    if isinstance(calibration, (str, Path)):
        return Path(calibration).name if Path(calibration).is_file() else str(calibration)
    return "token ids" if isinstance(calibration, Tensor) else "texts"


class _Names:
    """llama.cpp's names of a model's matrices."""

    def __init__(self, config: Any) -> None:
        import gguf

        self._data, self._config = checked_architecture(config.model_type), config
        self.architecture = self._data.name
        number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._table = gguf.get_tensor_name_map(number, config.get_text_config().num_hidden_layers)

    def of(self, parameter: str) -> str:
        """Tensor of the file that holds a parameter."""
        name = self._table.get_name(parameter.removesuffix(".weight"))
        if name is None:
            self._data.check(self._config.to_dict())  # may know what is unusual about the model
            raise UnsupportedError(
                f"the gguf package has no name for {parameter} of {self.architecture}: upgrade gguf, or "
                "export without calibration"
            )
        return f"{name}.weight"


class _Products(TorchFunctionMode):
    """Sums the squares of what the matrices of a module are multiplied with, wherever in it that happens.

    Routers are no `nn.Linear`, so modules have no hook that would show their inputs; the product itself is
    `torch.nn.functional.linear` in all of them.

    Parameters
    ----------
    module : nn.Module
        With weights in memory.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._owners: dict[int, str] = {}
        self._seen: tuple[Tensor, Tensor] | None = None
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                # float64 on the CPU, because not every device has it.
                self.sums[name] = torch.zeros(parameter.shape[-1], dtype=torch.float64, device="cpu")
                self.counts[name] = 0
                self._owners[parameter.data_ptr()] = name

    def stacks(self) -> dict[str, list[str]]:
        """Matrices by name, those of experts that are one tensor of a GGUF together, without their number."""
        found: dict[str, list[str]] = {}
        for name in self.sums:
            found.setdefault(role(name).replace(".#", ""), []).append(name)
        return found

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is nn.functional.linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            owner = self._owners.get(given["weight"].data_ptr())
            if owner is not None:
                self._add(owner, given["input"])
        return function(*args, **(kwargs or {}))

    def _add(self, name: str, x: Tensor) -> None:
        # q, k and v, or gate and up, are given the very same tensor one after another.
        if self._seen is None or self._seen[0] is not x:
            self._seen = x, squares(x)
        self.sums[name] += self._seen[1]
        self.counts[name] += x.numel() // x.shape[-1]


def squares(x: Tensor) -> Tensor:
    """Sum of squares of each column of activations ``[..., K]``, float64 on the CPU."""
    return x.detach().float().reshape(-1, x.shape[-1]).square().sum(0).cpu().double()


def _head_entry(stream: LayerStream) -> ImatrixEntry:
    seen: list[Tensor] = []
    tokens: list[int] = []

    def see(x: Tensor) -> None:
        seen.append(squares(x))
        tokens.append(x.numel() // x.shape[-1])

    stream.watch_head(see)
    return _entry(_HEAD, torch.stack(seen).sum(0)[None], torch.tensor([sum(tokens)]))


def _entry(name: str, sums: Tensor, counts: Tensor) -> ImatrixEntry:
    if not bool(counts.any()):
        raise UnsupportedError(
            f"{name} is multiplied in a way that qkern does not follow, so its activations are unknown: "
            "export this model without calibration"
        )
    values = sums.float()
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name} is given activations that are NaN or Inf: repair the checkpoint")
    return ImatrixEntry(sums=values, counts=counts)


def is_weighed(tensor: PlannedTensor) -> bool:
    """Whether importance has a say in a tensor's codes: Q8_0 has a scale that follows from its weights."""
    return tensor.type.block > 1 and tensor.type.name != "q8_0"


def with_importance(
    tensors: Sequence[PlannedTensor], matrix: Imatrix, *, kept: Container[str] = ()
) -> list[PlannedTensor]:
    """Give the tensors of an export the importance of their columns; what has none is named in a warning.

    Parameters
    ----------
    tensors : sequence of PlannedTensor
        All that are in the file.
    matrix : Imatrix
        The importance.
    kept : container of str
        Names of those that keep codes that were chosen before.

    Raises
    ------
    InputError
        If the importance matrix was made for another model.
    """
    weighted = [
        replace(tensor, importance=matrix.importance(tensor.name, tensor.shape)) for tensor in tensors
    ]
    if all(tensor.importance is None for tensor in weighted):
        raise InputError(
            f"the importance matrix was made for another model: it has {_some(list(matrix.entries))}, the "
            f"model has {_some([tensor.name for tensor in tensors])}"
        )
    searched = [tensor for tensor in weighted if is_weighed(tensor) and tensor.name not in kept]
    if all(tensor.importance is None for tensor in searched):
        logger.warning(
            "the importance matrix changes nothing: no tensor that it has an entry for gets codes that are "
            "searched (16-bit types and q8_0 need no search, and codes of a quantized checkpoint are kept)"
        )
    else:
        # llama.cpp's own files have none of embeddings and heads.
        missing = [
            tensor.name for tensor in searched if tensor.importance is None and tensor.name.startswith("blk.")
        ]
        _warn_of("the importance matrix has no entry for", missing)
        dark = [text for tensor in searched for text in _unreached(tensor)]
        _warn_of("no token of the importance matrix reached", dark)
    known = {tensor.name for tensor in tensors}
    strangers = [name for name in matrix.entries if name not in known]
    if strangers:
        logger.warning(
            "%d entries of the importance matrix are of no tensor of the model: %s",
            len(strangers),
            _some(strangers),
        )
    return weighted


def _unreached(tensor: PlannedTensor) -> list[str]:
    """Name the matrices of a tensor whose importance is zero throughout."""
    if tensor.importance is None:
        return []
    dark = (tensor.importance == 0).all(-1)
    if dark.dim() == 0:
        return [tensor.name] if bool(dark) else []
    experts = ", ".join(map(str, dark.nonzero().flatten().tolist()))
    return [f"{tensor.name} (expert {experts})"] if experts else []


def _warn_of(what: str, names: Sequence[str]) -> None:
    if names:
        logger.warning("%s %s: quantized with all columns alike", what, _some(names))


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest
