"""A GGUF file run by llama.cpp itself: a function from ids to logits, and a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qkern.errors import FormatError, InputError, QkernError, UnsupportedError
from qkern.gguf import ARCHITECTURES, GGUFFile

__all__ = ["LlamaCpp"]

# Tokens of a prompt that run together, as in llama.cpp's own programs.
_CHUNK: Final = 512


class LlamaCpp:
    """A GGUF model in llama-cpp-python.

    Calling it maps ids ``[B, T]`` to fp32 logits ``[B, T, V]``. Without `logits_all` it is a `Decoder`.

    Parameters
    ----------
    path : str or Path
        The ``.gguf`` file.
    context : int
        Tokens that a window, or a prompt with what follows it, may have.
    threads : int, optional
        CPU threads; default: as many as torch uses.
    f32_cache : bool
        Keep the key-value cache in fp32, as transformers does for an fp32 model; llama.cpp's default is
        fp16.
    logits_all : bool
        Make room for the logits of a whole window. False makes none but for the last token, and reads
        prompts in llama.cpp's own portions.

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
        self,
        path: str | Path,
        *,
        context: int = 512,
        threads: int | None = None,
        f32_cache: bool = False,
        logits_all: bool = True,
    ) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise UnsupportedError(
                f"running a GGUF needs llama-cpp-python, which does not import ({error}); "
                "install it with: pip install llama-cpp-python"
            ) from error
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no GGUF file at {path}; name an existing .gguf file")
        count = torch.get_num_threads() if threads is None else threads
        batch = context if logits_all else min(context, _CHUNK)
        cache_type = llama_cpp.GGML_TYPE_F32 if f32_cache else None
        try:
            self.llama: Any = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=context,
                n_batch=batch,
                n_ubatch=batch,
                n_threads=count,
                n_threads_batch=count,
                type_k=cache_type,
                type_v=cache_type,
                logits_all=logits_all,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"llama.cpp cannot load {path}: {_reason(path) or error}") from error
        known = ARCHITECTURES.get(self.llama.metadata.get("general.architecture", ""))
        if known is not None and known.is_encoder:
            raise UnsupportedError(
                f"{path} is an encoder ({known.name}): it makes embeddings and no logits; name a causal LM"
            )
        self.context = min(context, llama_cpp.llama_model_n_ctx_train(self.llama.model))
        """Tokens that it reads at most."""
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
        if ids.shape[-1] > self.context:
            raise InputError(
                f"a window must fit the model's context: got {ids.shape[-1]} tokens, it reads "
                f"{self.context}; give a smaller window"
            )
        rows = []
        for row in ids.tolist():
            self.llama.reset()
            self.llama.eval(row)
            rows.append(torch.from_numpy(self.llama.scores[: len(row)].copy()))
        return torch.stack(rows)

    def prefill(self, ids: Tensor) -> Tensor:
        """Forget everything and read int64 ``[T]``; logits ``[V]`` of the last."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)
        for chunk in torch.split(ids, _CHUNK):
            logits = self._decode(chunk.tolist())
        return logits

    def step(self, token: int) -> Tensor:
        """Read one more token; its logits ``[V]``."""
        return self._decode([token])

    def _decode(self, ids: list[int]) -> Tensor:
        # llama.cpp's own functions: the Python layer above them costs as much as a small model's token.
        import llama_cpp

        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        context = self.llama.ctx
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise QkernError(f"llama.cpp cannot go on with {len(ids)} tokens: llama_decode returned {code}")
        logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(context, -1), shape=(self.llama.n_vocab(),)
        )
        return torch.from_numpy(logits.copy())

    @property
    def ends(self) -> set[int]:
        """Tokens that end a text."""
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        return {
            token for token in range(self.llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)
        }

    def detokenize(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        text: bytes = self.llama.detokenize(ids)
        return text.decode("utf-8", errors="replace")


def _reason(path: Path) -> str | None:
    """Say what is wrong with a file, which llama.cpp only logs; None if nothing is to be seen."""
    try:
        with GGUFFile(path) as file:
            kind = file.metadata.get("general.type", "model")
    except QkernError as error:
        return str(error)
    return None if kind == "model" else f"its general.type is {kind!r:.60}, not 'model'"
