"""How an encoder's token embeddings become one, from the files of sentence-transformers beside the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qkern.errors import FormatError, UnsupportedError
from qkern.gguf.json_files import reading

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["pooling_of"]

# Keys of the pooling module's configuration, and llama.cpp's names.
_MODES: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
# Where the newest releases have one key instead of one for each mode.
_NAMES: Final = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


def pooling_of(folder: Path) -> str:
    """Return ``"mean"``, ``"cls"`` or ``"last"``; ``"none"``, an embedding a token, without such files.

    Raises
    ------
    UnsupportedError
        If the embedding is computed in a way that llama.cpp has not.
    FormatError
        If a file is damaged.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return "none"
    with reading(file, list) as listed:
        modules = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in listed}
    others = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if others:
        raise UnsupportedError(
            f"{file} has modules that are not exported to GGUF: {', '.join(others)}; allowed are "
            "Transformer, Pooling, Normalize"
        )
    if "Pooling" not in modules:
        return "none"
    file = folder / modules["Pooling"] / "config.json"
    if not file.is_file():
        raise FormatError(f"{file} is missing, which says how embeddings are pooled; fetch it")
    with reading(file) as settings:
        return _mode(file, settings)


def _mode(file: Path, settings: Mapping[str, Any]) -> str:
    modes = [mode for key, mode in _MODES.items() if settings.get(key)]
    others = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    if "pooling_mode" in settings:
        modes = [_NAMES[name] for name in [str(settings["pooling_mode"])] if name in _NAMES]
        others = modes
    if len(modes) != 1 or len(others) != 1:
        raise UnsupportedError(f"{file}: llama.cpp pools by one of {', '.join(_NAMES)}: got {settings}")
    return modes[0]
