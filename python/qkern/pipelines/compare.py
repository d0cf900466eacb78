"""The verb `compare`: models beside their original, each measured in a process of its own."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

import qkern
from qkern import _progress
from qkern.checkpoints import model_folder
from qkern.errors import InputError, QkernError
from qkern.evaluation import MIN_POSITIONS, Interval, bpw_file, file_bytes, paired_bootstrap, read_text
from qkern.evaluation.decoding import Speed
from qkern.evaluation.machine import available_bytes, machine
from qkern.evaluation.reference import ReferenceReader
from qkern.evaluation.scoring import Score
from qkern.pipelines.contestant import REFERENCE, Task, kl_file, megabytes
from qkern.pipelines.load import is_gguf

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PROMPT_LENGTHS", "ComparedModel", "Comparison", "compare"]

logger = logging.getLogger(__name__)

PROMPT_LENGTHS: Final = (1, 6144, 14336, 30720)
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
_DEFAULT_PROMPTS, _PROMPT_WORDS = 3, 12
# -P: what lies in the current folder is no part of this program.
_PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); from qkern.pipelines.contestant import serve; serve()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """What was found of a model; None where there is nothing, and `failure` or `notes` say why.

    Parameters
    ----------
    name, path : str
        What it is called, and where it is.
    runner : str or None
        What ran it, and where: ``"qkern, cpu"`` (through transformers), ``"llama.cpp, cpu"``.
    file_bytes : int or None
        Its weight files.
    bpw_file, bpw_linear : float or None
        Bits per weight of everything, and of the linear layers.
    load_seconds : float or None
        Until it had read its first token.
    base_bytes, peak_bytes : int or None
        Memory of its process before it was loaded, and the most of it after samples and prompts; scoring
        is left out.
    device_peak_bytes : int or None
        The most of the GPU's memory.
    speeds : tuple of Speed
        One for each length of prompt.
    score : Score or None
        On the held-out text.
    samples : tuple of str or None
        What follows each prompt.
    notes : tuple of str
        What is unusual about its numbers.
    failure : str or None
        Why it was not measured, or not to the end.
    """

    name: str
    path: str
    runner: str | None = None
    file_bytes: int | None = None
    bpw_file: float | None = None
    bpw_linear: float | None = None
    load_seconds: float | None = None
    base_bytes: int | None = None
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    speeds: tuple[Speed, ...] = ()
    score: Score | None = None
    samples: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Result of `compare`.

    Parameters
    ----------
    models : tuple of ComparedModel
        The original first, run or not.
    prompts : tuple of str
        What the models continued.
    settings : dict
        The arguments.
    machine : str
        Where it was.
    notes : tuple of str
        What holds for all numbers.
    """

    models: tuple[ComparedModel, ...]
    prompts: tuple[str, ...]
    settings: dict[str, Any] = field(repr=False)
    machine: str
    notes: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compare: no model but the original could be loaded."""
        return all(model.load_seconds is None for model in self.models[1:])

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        found = asdict(self)
        for model, entry in zip(self.models, found["models"], strict=True):
            if model.score is not None and model.score.kl is not None:
                entry["score"]["kl"] = model.score.kl._asdict()
        return found


def compare(
    original: str | Path,
    models: Sequence[str | Path],
    *,
    text: str | Path,
    tokens: int = 16384,
    window: int = 512,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    new_tokens: int = 32,
    prompts: Sequence[str] | None = None,
    skip_original: bool = False,
    dtype: str = "float32",
    device: str = "auto",
) -> Comparison:
    """Measure models beside the one that they were made of: size, speed, memory, quality, samples.

    The models run one after the other, each in a process of its own. One that cannot be loaded, runs out of
    memory or dies has the reason in its row, and the others go on. Speed, memory and samples are those of
    the defaults (int8 activations on a CPU, the checkpoint's dtype); the text is scored with float
    activations in `dtype`, but for schemes that say a8. llama.cpp computes as it always does.

    Parameters
    ----------
    original : str or Path
        What KL and agreement refer to: a folder or hub id, or a GGUF.
    models : sequence of str or Path
        16-bit or quantized folders, hub ids, and GGUF files, which llama.cpp runs.
    text : str or Path
        UTF-8 file of held-out text. All models read the first one's tokens, if they share a vocabulary.
    tokens : int
        How many of them are scored.
    window : int
        Tokens of a window, as in `qkern.evaluation.perplexity`.
    prompt_lengths : sequence of int
        Prompts, cut from the text, that speed is measured at; those that a model has no context for are
        left out, and its row says so.
    new_tokens : int
        Tokens that are made after each prompt.
    prompts : sequence of str, optional
        What each model continues, taking the likeliest token each time; default: three beginnings of
        paragraphs of the text.
    skip_original : bool
        Do not run the original, which may not fit in memory: its row has its size alone, and there is no KL
        and no agreement.
    dtype : {"float32", "bfloat16", "float16", "auto"}
        What folders are scored in; ``"auto"``: the checkpoint's dtype, as `qkern perplexity` does.
    device : str
        Where folders run; llama.cpp is on the CPU.

    Returns
    -------
    Comparison
        Also where nothing could be measured; see `Comparison.is_empty`.

    Raises
    ------
    InputError
        If an argument or the text cannot be.
    """
    content = read_text(text)
    settings: dict[str, Any] = {
        "text": str(text),
        "tokens": tokens,
        "window": window,
        "prompt_lengths": sorted(set(prompt_lengths)),
        "new_tokens": new_tokens,
        "dtype": dtype,
        "device": device,
    }
    _check(settings, models, prompts)
    prompts = list(prompts or _beginnings(content))
    paths = [str(original), *map(str, models)]
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="qkern-compare-") as folder,
        _progress.task("Comparing", total=len(paths), unit="model") as progress,
    ):
        for number, (path, name) in enumerate(zip(paths, _names(paths), strict=True)):
            row = _weighed(path, name)
            if number == 0 and skip_original:
                row = replace(row, failure=row.failure or "not run: the original is skipped")
            elif row.failure is None:
                task = Task(
                    path=path,
                    number=number,
                    folder=folder,
                    prompts=prompts,
                    threads=torch.get_num_threads(),
                    **{**settings, "dtype": None if dtype == "auto" else dtype},
                )
                row = _measured(row, task, progress)
            if row.failure is not None:
                logger.info("%s: %s", name, row.failure)
            found.append(row)
            progress.advance()
        notes = _notes(found, Path(folder), window)
    return Comparison(
        models=tuple(found), prompts=tuple(prompts), settings=settings, machine=machine(), notes=notes
    )


def _check(settings: dict[str, Any], models: Sequence[Any], prompts: Sequence[str] | None) -> None:
    if not models:
        raise InputError("there is nothing to compare the original with: name at least one more model")
    if settings["dtype"] not in DTYPES:
        raise InputError(f"unknown dtype {settings['dtype']!r}: allowed are {', '.join(DTYPES)}")
    if not settings["prompt_lengths"] or settings["prompt_lengths"][0] < 1:
        raise InputError(f"prompt lengths must be at least 1: got {settings['prompt_lengths']}")
    if settings["new_tokens"] < 1:
        raise InputError(f"new_tokens must be at least 1: got {settings['new_tokens']}")
    if settings["window"] < 4 or settings["tokens"] < settings["window"]:
        raise InputError(
            f"tokens must fill at least one window of at least 4: got {settings['tokens']} tokens and "
            f"windows of {settings['window']}"
        )
    if prompts is not None and not all(prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty: give text to continue, or leave prompts out")


def _beginnings(content: str) -> list[str]:
    """Beginnings of paragraphs from all over a text."""
    paragraphs = [line for line in content.splitlines() if line.strip()]
    step = max(1, len(paragraphs) // _DEFAULT_PROMPTS)
    chosen = paragraphs[::step][:_DEFAULT_PROMPTS]
    return list(dict.fromkeys(" ".join(line.split()[:_PROMPT_WORDS]) for line in chosen))


def _names(paths: Sequence[str]) -> list[str]:
    """Last parts of paths, or paths as they are where those are not unique."""
    short = [Path(path).resolve().name for path in paths]
    return [path if short.count(name) > 1 else name for path, name in zip(paths, short, strict=True)]


def _weighed(path: str, name: str) -> ComparedModel:
    """Size of a model, and whether it could be loaded at all."""
    row = ComparedModel(name=name, path=path)
    try:
        files = Path(path) if is_gguf(path) else model_folder(path)
        row = replace(row, file_bytes=file_bytes(files), bpw_file=bpw_file(files))
    except (QkernError, OSError) as error:
        return replace(row, failure=str(error))
    free = available_bytes()
    if row.file_bytes is not None and row.file_bytes > free:
        need = megabytes(row.file_bytes)
        return replace(
            row, failure=f"does not fit in memory: its weights take {need}, and {megabytes(free)} are free"
        )
    return row


def _measured(row: ComparedModel, task: Task, progress: _progress.Task) -> ComparedModel:
    """Add what the model's own process finds."""
    facts: dict[str, Any] = {"doing": "starting"}
    home = str(Path(qkern.__file__).parent.parent)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as child,
    ):
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError), child.stdin:
                json.dump(asdict(task), child.stdin)
            for line in child.stdout:
                facts |= json.loads(line)
                progress.advance(0, note=f"{row.name}: {facts['doing']}")
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        log.seek(0)
        said = log.read().strip()
    if said:
        logger.debug("%s wrote:\n%s", row.name, said)
    doing = facts.pop("doing")
    if "failure" in facts:
        facts["failure"] = f"{doing}: {facts['failure']}"
    elif code != 0:
        facts["failure"] = f"{doing}: {_end(code, said)}"
    facts["speeds"] = tuple(Speed(**speed) for speed in facts.get("speeds", ()))
    facts["samples"] = tuple(facts.get("samples", ()))
    facts["notes"] = tuple(facts.get("notes", ()))
    if (scored := facts.get("score")) is not None:
        kl = scored["kl"]
        facts["score"] = Score(**{**scored, "kl": None if kl is None else Interval(*kl)})
    return replace(row, **facts)


def _end(code: int, said: str) -> str:
    """Say how a process ended that said nothing itself."""
    if code < 0:
        name = signal.Signals(-code).name
        reason = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{reason}"
    return f"its process ended with code {code}: {said.splitlines()[-1] if said else 'it said nothing'}"


def _notes(rows: Sequence[ComparedModel], folder: Path, window: int) -> tuple[str, ...]:
    """Say what KL and agreement are of, or why there are none, and which differences are beyond chance."""
    reference = folder / REFERENCE
    if not ReferenceReader.is_there(reference):
        return ("No KL and no agreement: the original was not scored.",)
    reader = ReferenceReader(reference)
    positions = rows[0].score.positions if rows[0].score is not None else 0
    over = f"all {reader.vocabulary} tokens"
    if reader.kept < reader.vocabulary:
        over = f"the original's {reader.kept} likeliest of {reader.vocabulary} tokens, all others as one"
        over += ": a lower bound"
    notes = [f"KL(original || model) and agreement over {positions} positions, {over}."]
    if positions < MIN_POSITIONS:
        notes.append(
            f"That is noisy: methods are ranked on at least {MIN_POSITIONS} positions; give a longer text."
        )
    scored = sorted(
        (row.score.kl.mean, number)
        for number, row in enumerate(rows)
        if row.score is not None and row.score.kl is not None
    )
    for (_, first), (_, second) in itertools.pairwise(scored):
        better, worse = (np.load(kl_file(folder, number)) for number in (first, second))
        found = paired_bootstrap(better, worse, window=window)
        chance = "" if found.is_below else ": the interval includes zero"
        notes.append(
            f"KL of {rows[first].name} less that of {rows[second].name}: "
            f"{found.mean:.5f} ({found.low:.5f} to {found.high:.5f}){chance}."
        )
    return tuple(notes)
