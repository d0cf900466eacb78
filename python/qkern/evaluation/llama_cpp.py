"""A GGUF file run by llama.cpp itself, as a function from ids to logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkern.errors import FormatError, InputError, QkernError, UnsupportedError
from qkern.gguf import ARCHITECTURES, GGUFFile

__all__ = ["LlamaCpp"]


class LlamaCpp:
    """A GGUF model in llama-cpp-python; calling it maps ids ``[B, T]`` to fp32 logits ``[B, T, V]``.

    Parameters
    ----------
    path : str or Path
        The ``.gguf`` file.
    context : int
        Tokens that a window may have.
    threads : int, optional
        CPU threads; default: as many as torch uses.
    f32_cache : bool
        Keep the key-value cache in fp32, as transformers does for an fp32 model; llama.cpp's default is
        fp16.

    Raises
    ------
    UnsupportedError
        If llama-cpp-python is not installed, or the model is an encoder.
    InputError
        If the file does not exist.
    FormatError
        If llama.cpp cannot load it.
    """

    def __init__(
        self, path: str | Path, *, context: int = 512, threads: int | None = None, f32_cache: bool = False
    ) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise UnsupportedError(
                f"running a GGUF needs llama-cpp-python, which does not import ({error}); "
                'install it with: pip install "qkern[llama]"'
            ) from error
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no GGUF file at {path}; name an existing .gguf file")
        count = torch.get_num_threads() if threads is None else threads
        cache_type = llama_cpp.GGML_TYPE_F32 if f32_cache else None
        try:
            self.llama: Any = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=context,
                n_batch=context,
                n_ubatch=context,
                n_threads=count,
                n_threads_batch=count,
                type_k=cache_type,
                type_v=cache_type,
                logits_all=True,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"llama.cpp cannot load {path}: {_reason(path) or error}") from error
        known = ARCHITECTURES.get(self.llama.metadata.get("general.architecture", ""))
        if known is not None and known.is_encoder:
            raise UnsupportedError(
                f"{path} is an encoder ({known.name}): it makes embeddings and no logits; name a causal LM"
            )
        self._context = min(context, llama_cpp.llama_model_n_ctx_train(self.llama.model))
        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        self.bos: int | None = (
            self.llama.token_bos() if llama_cpp.llama_vocab_get_add_bos(vocabulary) else None
        )
        """Token that begins every text, if the file says that there is one."""

    def tokenize(self, text: str) -> Tensor:
        """Ids of the file's own tokenizer with the special tokens that it adds; int64 ``[T]``."""
        ids = self.llama.tokenize(text.encode("utf-8"), add_bos=True)
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of each row of ids, every row read from its start.

        Raises
        ------
        InputError
            If a row is longer than `context`, or than the context that the model was trained for.
        """
        if ids.shape[-1] > self._context:
            raise InputError(
                f"a window must fit the model's context: got {ids.shape[-1]} tokens, it reads "
                f"{self._context}; give a smaller window"
            )
        rows = []
        for row in ids.tolist():
            self.llama.reset()
            self.llama.eval(row)
            rows.append(torch.from_numpy(self.llama.scores[: len(row)].copy()))
        return torch.stack(rows)


def _reason(path: Path) -> str | None:
    """Say what is wrong with a file, which llama.cpp only logs; None if nothing is to be seen."""
    try:
        with GGUFFile(path) as file:
            kind = file.metadata.get("general.type", "model")
    except QkernError as error:
        return str(error)
    return None if kind == "model" else f"its general.type is {kind!r:.60}, not 'model'"
