"""One model of `compare`, measured in the process that this runs in, which it has for itself."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from qkern.checkpoints import model_folder
from qkern.errors import InputError, QkernError, reason_of
from qkern.evaluation import (
    bos_if_added,
    bpw_linear,
    gguf_bpw_linear,
    parameter_count,
    read_text,
    token_ids,
)
from qkern.evaluation.decoding import Decoder, Speed, TransformersDecoder, continued, measure_speed
from qkern.evaluation.llama_cpp import LlamaCpp
from qkern.evaluation.machine import available_bytes, peak_bytes
from qkern.evaluation.reference import ReferenceReader, ReferenceWriter
from qkern.evaluation.scoring import score
from qkern.evaluation.windows import runner
from qkern.gguf import GGUFFile
from qkern.pipelines.load import is_gguf, load, load_with_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torch import Tensor

    from qkern.evaluation.scoring import Score
    from qkern.evaluation.windows import Logits

__all__ = ["REFERENCE", "REFERENCE_BYTES", "Task", "kl_file", "measure", "megabytes", "serve"]

REFERENCE: Final = "reference.bin"
"""Name of the file in which the original's distributions are."""
REFERENCE_BYTES: Final = 4 << 30
"""Most that it takes, if the disk has twice as much."""
_TOKENS: Final = "tokens.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is measured of which model, all in JSON's types.

    Parameters
    ----------
    path : str
        The model.
    number : int
        Which one it is; 0 is the original, whose distributions are kept for the others.
    folder : str
        Where what the models share is kept while they are compared.
    text : str
        File of the held-out text.
    tokens, window : int
        How much of it is scored, and in windows of how many tokens.
    prompt_lengths : list of int
        Tokens of the prompts that speed is measured at.
    new_tokens : int
        Tokens after each prompt.
    prompts : list of str
        What is continued.
    dtype : str or None
        Of the scoring; None: that of the checkpoint.
    device : str
        Where folders run.
    threads : int
        Of torch and llama.cpp.
    """

    path: str
    number: int
    folder: str
    text: str
    tokens: int
    window: int
    prompt_lengths: list[int]
    new_tokens: int
    prompts: list[str]
    dtype: str | None
    device: str
    threads: int


class _Contestant(Protocol):
    """What a model is measured through."""

    runner: str
    bos: int | None
    ends: Collection[int]
    bpw_linear: float

    def __init__(self, task: Task) -> None: ...
    @staticmethod
    def prepare(task: Task) -> None:
        """Import what is imported once, whatever the model's size."""
        ...

    def decoder(self) -> Decoder: ...
    def tokenize(self, text: str) -> Tensor: ...
    def detokenize(self, ids: list[int]) -> str: ...
    def scorer(self) -> Logits:
        """Make what is scored; the decoder is not used any more."""
        ...


class _Folder:
    @staticmethod
    def prepare(task: Task) -> None:
        parameter_count(model_folder(task.path))  # with that transformers has the architecture's modules

    def __init__(self, task: Task) -> None:
        self._task = task
        self._model, self._tokenizer = load_with_tokenizer(task.path, device=task.device)
        self.runner = f"qkern, {self._model.device.type}"
        self.bos = bos_if_added(self._tokenizer)
        self.bpw_linear = bpw_linear(self._model)
        ends: Any = getattr(self._model.generation_config, "eos_token_id", None)
        self.ends: Collection[int] = ends if isinstance(ends, list) else [ends]

    def decoder(self) -> Decoder:
        return TransformersDecoder(self._model)

    def tokenize(self, text: str) -> Tensor:
        return token_ids(self._tokenizer, text)

    def detokenize(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def scorer(self) -> Logits:
        dtype = None if self._task.dtype is None else getattr(torch, self._task.dtype)
        if dtype not in (None, self._model.dtype):
            need = sum(parameter.numel() for parameter in self._model.parameters()) * dtype.itemsize
            need += sum(buffer.nbytes for buffer in self._model.buffers())
            self._model = None
            gc.collect()
            free = available_bytes()
            if need > free:
                raise InputError(
                    f"in {self._task.dtype} its weights take {megabytes(need)}, and {megabytes(free)} of "
                    "memory are free: score in the checkpoint's own dtype (--dtype auto)"
                )
            self._model = load(self._task.path, dtype=dtype, device=self._task.device)
        return runner(self._model, None)


class _Gguf:
    runner = "llama.cpp, cpu"

    @staticmethod
    def prepare(task: Task) -> None:
        with suppress(ImportError):  # is explained by what needs it
            import llama_cpp  # noqa: F401

    def __init__(self, task: Task) -> None:
        self._task = task
        # A token has at least a byte.
        longest = max(*task.prompt_lengths, *(len(prompt.encode()) + 1 for prompt in task.prompts))
        self._llama = LlamaCpp(
            task.path, context=min(longest + task.new_tokens, _trained(task.path)), logits_all=False
        )
        self.bos = self._llama.bos
        self.ends: Collection[int] = self._llama.ends
        self.bpw_linear = gguf_bpw_linear(task.path)

    def decoder(self) -> Decoder:
        return self._llama

    def tokenize(self, text: str) -> Tensor:
        return self._llama.tokenize(text)

    def detokenize(self, ids: list[int]) -> str:
        return self._llama.detokenize(ids)

    def scorer(self) -> Logits:
        del self._llama
        gc.collect()
        return LlamaCpp(self._task.path, context=self._task.window)


def _trained(path: str) -> int:
    """Context of the model in a GGUF."""
    with GGUFFile(path) as file:
        architecture = file.metadata.get("general.architecture")
        return int(file.metadata.get(f"{architecture}.context_length", 1 << 31))


def serve() -> None:
    """Measure the task on stdin, and write what is found to stdout, a JSON object a line."""
    # Libraries print what they like: only this channel leads to whoever asked.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = Task(**json.load(sys.stdin))
    torch.set_num_threads(task.threads)
    try:
        for facts in measure(task):
            channel.write(json.dumps(facts) + "\n")
    except (QkernError, RuntimeError, MemoryError, OSError) as error:
        channel.write(json.dumps({"failure": reason_of(error)}) + "\n")


def measure(task: Task) -> Iterator[dict[str, Any]]:
    """Measure a model step by step.

    Parameters
    ----------
    task : Task
        What of which.

    Yields
    ------
    dict
        Fields of `ComparedModel`, as JSON values, the later in the place of the earlier ones; ``doing`` says
        what comes next.

    Raises
    ------
    QkernError
        If the model cannot be loaded.
    """
    yield {"doing": "loading"}
    kind: type[_Contestant] = _Gguf if is_gguf(task.path) else _Folder
    kind.prepare(task)
    base = peak_bytes()
    started = time.perf_counter()
    model = kind(task)
    decoder = model.decoder()
    # Files are mapped and layers are packed when they are first used.
    vocabulary = len(decoder.prefill(torch.zeros(1, dtype=torch.int64)))
    yield {
        "runner": model.runner,
        "load_seconds": time.perf_counter() - started,
        "base_bytes": base,
        "bpw_linear": model.bpw_linear,
        "doing": "reading the text",
    }
    shared, notes = _share_tokens(task, model, vocabulary)
    ids = torch.tensor(shared["ids"])
    samples: list[str | None] = []
    for prompt in task.prompts:
        yield {"doing": "continuing a prompt"}
        try:
            made = continued(decoder, model.tokenize(prompt), task.new_tokens, model.ends)
            samples.append(model.detokenize(made))
        except InputError as error:
            samples.append(None)
            notes.append(f"the prompt {prompt!r:.60} is not continued: {error}")
        yield {"samples": samples, "notes": notes, **_peaks()}
    speeds: list[dict[str, Any]] = []
    for length in task.prompt_lengths:
        yield {"doing": f"reading a prompt of {length} tokens"}
        try:
            speed = measure_speed(decoder, ids, length, task.new_tokens)
        except (QkernError, RuntimeError, MemoryError) as error:
            speed = Speed(prompt=length, absent=reason_of(error))
        speeds.append(asdict(speed))
        yield {"speeds": speeds, **_peaks()}
    # From here on memory is taken that belongs to the comparison, not to the model.
    del decoder
    yield {"doing": "scoring"}
    try:
        result = _score(task, model.scorer, ids, shared["bos"], comparable=shared["vocabulary"] == vocabulary)
        yield {"score": asdict(result)}
    except (QkernError, RuntimeError, MemoryError) as error:
        yield {"notes": [*notes, f"not scored: {reason_of(error)}"]}


def _peaks() -> dict[str, Any]:
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "peak_bytes": peak_bytes(),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _share_tokens(task: Task, model: _Contestant, vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """Tokens of the text: the first model's, or its own where they mean something else to it."""
    file = Path(task.folder) / _TOKENS
    own = {
        "ids": model.tokenize(read_text(task.text))[: task.tokens].tolist(),
        "bos": model.bos,
        "vocabulary": vocabulary,
    }
    if not file.exists():
        file.write_text(json.dumps(own))
        return own, []
    shared: dict[str, Any] = json.loads(file.read_text())
    if shared["vocabulary"] != vocabulary:
        note = f"has {vocabulary} logits, not {shared['vocabulary']}: it reads its own tokens, and has no KL"
        return {**own, "vocabulary": shared["vocabulary"]}, [note]
    if (shared["ids"], shared["bos"]) != (own["ids"], own["bos"]):
        return shared, ["its own tokenizer cuts the text differently: it reads the first model's tokens"]
    return shared, []


def _score(
    task: Task, scorer: Callable[[], Logits], ids: Tensor, bos: int | None, *, comparable: bool
) -> Score:
    path = Path(task.folder) / REFERENCE
    run = scorer()
    if task.number == 0:
        positions = len(ids) // task.window * task.window
        limit = min(REFERENCE_BYTES, shutil.disk_usage(task.folder).free // 2)
        with ReferenceWriter(path, max(positions, 1), limit) as writer:
            return score(run, ids, window=task.window, bos=bos, reference=writer)
    reader = ReferenceReader(path) if comparable and ReferenceReader.is_there(path) else None
    result = score(run, ids, window=task.window, bos=bos, reference=reader)
    if reader is not None:
        np.save(kl_file(task.folder, task.number), reader.kl)
    return result


def kl_file(folder: str | Path, number: int) -> Path:
    """Where the KL of model `number` at each position is kept, if it has one."""
    return Path(folder) / f"kl-{number}.npy"


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
