"""Writing a checkpoint: all of it or nothing.

Everything goes to a hidden sibling folder that takes the output's name at the very end. A failure, a full
disk among them, removes it.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern._version import __version__
from qkern.checkpoints.folder import model_folder
from qkern.checkpoints.registry import format_named
from qkern.checkpoints.shards import ShardWriter, parse_size
from qkern.errors import InputError, OutputError, UnsupportedError, advice_on_writing, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from torch import Tensor

    from qkern.checkpoints.base import Format
    from qkern.schemes import QuantizedWeight, Scheme

__all__ = ["RECIPE_NAME", "CheckpointWriter", "check_output", "new_folder"]

RECIPE_NAME: Final = "qkern.json"

# Files of a model folder that make it usable beside weights and config.json.
_COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def check_output(output: str | Path, *, source: str | Path | None = None) -> Path:
    """Return the output folder as an absolute path, links followed, if a checkpoint may be written there.

    Parameters
    ----------
    output : str or Path
        The folder to write.
    source : str, Path or None
        Folder of the model that is read, which must stay as it is; anything else than a folder is ignored.

    Raises
    ------
    InputError
        If it lies in `source` or around it, exists and is not an empty folder, or is a folder that cannot be
        replaced by the finished one.
    """
    given = Path(output)
    folder = given.resolve()
    if source and Path(source).is_dir():
        model = Path(source).resolve()
        if folder.is_relative_to(model) or model.is_relative_to(folder):
            raise InputError(
                f"output folder {given} and the model folder {source} must not be the same or one inside the "
                f"other: the model's folder stays as it is; choose a folder beside it, for example "
                f"{Path(source).with_name(f'{model.name}-quantized')}"
            )
    if folder.is_dir():
        if any(folder.iterdir()):
            raise InputError(f"output folder {given} exists and is not empty; choose another or empty it")
        if folder.is_mount() or folder.samefile(Path.cwd()):
            raise InputError(
                f"output folder {given} is a mount point or the current folder, which the finished output "
                f"cannot replace; name a folder in it: {given / 'model'}"
            )
    elif given.exists() or given.is_symlink():
        raise InputError(f"output {given} exists and is no folder; choose another")
    blocked = next((parent for parent in folder.parents if parent.exists()), folder)
    if not blocked.is_dir():
        raise InputError(f"output folder {given} cannot be made: {blocked} is a file; choose another")
    return folder


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Give a hidden folder that takes the output's name at the end of the block, or goes if the block fails.

    Raises
    ------
    InputError
        As `check_output` does.
    OutputError
        If nothing can be written there.
    """
    target = check_output(output)
    folder = _hidden(target)
    try:
        folder.mkdir(parents=True)
        yield folder
        _rename(folder, target)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(output: Path) -> Path:
    # Not the process id, which in containers is often that of a run that was killed.
    return output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")


def _rename(folder: Path, output: Path) -> None:
    if output.is_dir():
        output.rmdir()  # renaming onto an empty folder works on POSIX only
    folder.rename(output)


def _not_written(output: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {output}: {reason_of(error)}; no half-written output was left; "
        f"{advice_on_writing(error)}"
    )


class CheckpointWriter:
    """Writes a checkpoint, tensor by tensor; a context manager.

    Leaving the block without `finish`, or by an exception, leaves nothing behind.

    Parameters
    ----------
    output_dir : str or Path
        Must not exist, or be an empty folder.
    format : str or None
        A name of `FORMATS`; None writes a 16-bit checkpoint.
    max_shard_size : int or str
        Bytes, or a size such as ``"5GB"``.
    naming : callable, optional
        From every name that the writer is given, of a layer or a tensor, to the one that is written.

    Raises
    ------
    InputError
        If the folder is not empty, or an argument is not understood.
    OutputError
        If nothing can be written there.

    Examples
    --------
    >>> with CheckpointWriter("out", format="gptq") as writer:  # doctest: +SKIP
    ...     writer.add_quantized("model.layers.0.mlp.up_proj", qw)
    ...     writer.add_tensor("model.norm.weight", norm)
    ...     writer.finish(config, {"method": "gptq"}, tokenizer_from="original")
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        format: str | None = None,
        max_shard_size: int | str = "5GB",
        naming: Callable[[str], str] = str,
    ) -> None:
        self.output = check_output(output_dir)
        self._naming = naming
        self.format: Format | None = None if format is None else format_named(format)
        self.schemes: dict[str, Scheme] = {}
        self._act_order = False
        self._static: set[str] = set()
        self._finished = False
        max_bytes = parse_size(max_shard_size)
        self._folder = _hidden(self.output)
        with self._writing():
            self._folder.mkdir(parents=True)
        self._shards = ShardWriter(self._folder, max_bytes)

    def add_quantized(self, name: str, qw: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Write a quantized layer, and its bias as ``<name>.bias``.

        Raises
        ------
        UnsupportedError
            If the format cannot hold the weight without changing it.
        OutputError
            If the disk is full.
        """
        if self.format is None:
            raise UnsupportedError(f"{name}: this writer has no format for quantized layers; name one")
        name = self._naming(name)
        for key, tensor in self.format.encode(name, qw.to("cpu")).items():
            self._add(key, tensor)
        if bias is not None:
            self._add(f"{name}.bias", bias)
        self.schemes[name] = qw.scheme
        self._act_order |= qw.group_index is not None
        if qw.input_scale is not None:
            self._static.add(name)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor as it is.

        Raises
        ------
        InputError
            If the name was written before.
        OutputError
            If the disk is full.
        """
        self._add(self._naming(name), tensor)

    def _add(self, name: str, tensor: Tensor) -> None:
        with self._writing():
            self._shards.add(name, tensor)

    def add_json(self, file: str, content: Mapping[str, Any]) -> None:
        """Write one more JSON file, such as ``generation_config.json``."""
        with self._writing():
            self._write_json(file, content)

    def finish(
        self,
        config: Mapping[str, Any] | Any,
        recipe: Mapping[str, Any] | None = None,
        *,
        tokenizer_from: str | Path | Any | None = None,
        skipped: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
        custom_files: Sequence[str] = (),
    ) -> Path:
        """Write config, recipe and companions, and give the folder its name.

        Parameters
        ----------
        config : mapping or PretrainedConfig
            The model's; its ``quantization_config`` is replaced.
        recipe : mapping or None
            Goes into ``qkern.json`` beside the versions and each layer's scheme.
        tokenizer_from : str, Path, tokenizer or None
            Model folder (or hub id) whose tokenizer, generation config and chat template are copied, or a
            tokenizer object that is saved.
        skipped : sequence of str
            Linear layers that stay 16-bit, as runtimes must know them.
        details : mapping or None
            More fields of ``quantization_config``, for example ``damp_percent``.
        custom_files : sequence of str
            Names of more files in the folder of `tokenizer_from` to copy, such as modeling code.

        Returns
        -------
        Path
            The output folder.
        """
        fields = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
        fields.pop("quantization_config", None)
        with self._writing():
            if self.format is not None:
                if not self.schemes:
                    raise InputError(
                        f"a {self.format.name} checkpoint without a quantized layer cannot be written"
                    )
                if "lm_head" in self.schemes:
                    fields["tie_word_embeddings"] = False
                quantization = self.format.config(
                    self.schemes,
                    act_order=self._act_order,
                    static=self._static,
                    skipped=[self._naming(name) for name in skipped],
                    details=details,
                )
                fields["quantization_config"] = quantization
                for file, content in self.format.sidecars(quantization).items():
                    self._write_json(file, content)
            self._shards.close()
            self._write_json("config.json", fields)
            self._copy_companions(tokenizer_from, custom_files)
            self._write_json(RECIPE_NAME, self._recipe(recipe or {}))
            _rename(self._folder, self.output)
        self._finished = True
        return self.output

    def _recipe(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        import transformers

        layers: dict[str, Any] = {name: {"scheme": str(scheme)} for name, scheme in self.schemes.items()}
        named = {
            part: {self._naming(name): facts for name, facts in recipe[part].items()}
            for part in ("layers", "kept")
            if recipe.get(part)
        }
        for name, facts in named.get("layers", {}).items():
            layers[name] = {**layers.get(name, {}), **facts}
        return {
            "qkern": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "format": None if self.format is None else self.format.name,
            **recipe,
            **named,
            "layers": layers,
        }

    def _write_json(self, file: str, content: Mapping[str, Any]) -> None:
        try:
            text = json.dumps(content, indent=2, default=str, allow_nan=False)
        except ValueError as error:
            raise InputError(f"{file} cannot be written as JSON: {error}") from None
        (self._folder / file).write_text(text + "\n", encoding="utf-8")

    def _copy_companions(self, source: str | Path | Any | None, custom_files: Sequence[str]) -> None:
        if source is None:
            return
        if not isinstance(source, (str, Path)):
            source.save_pretrained(self._folder)
            return
        folder = model_folder(source)
        found = {file for pattern in _COMPANIONS for file in folder.glob(pattern)}
        for name in custom_files:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"custom file {name!r} is not in {folder}")
            found.add(folder / name)
        for file in sorted(found):
            if file.is_dir():
                shutil.copytree(file, self._folder / file.name)
            else:
                shutil.copyfile(file, self._folder / file.name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Remove everything on any failure; say what the system said, and that nothing is left."""
        try:
            yield
        except OSError as error:
            self.abort()
            raise _not_written(self.output, error) from error
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove what was written so far."""
        if hasattr(self, "_shards"):
            self._shards.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            return
        self.abort()
        if kind is None:
            raise InputError(
                f"{self.output}: the checkpoint was not finished; call finish() inside the block"
            )
