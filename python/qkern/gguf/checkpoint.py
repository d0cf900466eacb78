"""A GGUF as a model to load: its configuration, and its tensors under transformers' names."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor

from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.gguf.architectures import ARCHITECTURES
from qkern.gguf.quantized import map_rows, quantized_of
from qkern.gguf.reader import GGUFFile

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from qkern.gguf.reader import TensorInfo
    from qkern.schemes import QuantizedWeight

__all__ = ["GGUFCheckpoint"]

logger = logging.getLogger(__name__)

# llama.cpp's names; transformers' model types are the same. Mistral calls itself llama, which it computes.
_READ: Final = ("llama", "qwen2", "qwen3")
_EMBEDDING: Final = "model.embed_tokens"
_FACTORS: Final = "rope_freqs.weight"
_PLAIN: Final = ("f32", "f16", "bf16")
# Settings of rotary scaling, which are loaded only if they change nothing; llama.cpp writes -1 for none.
_UNCHANGED: Final = {
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "yarn_log_multiplier": (0.0,),
}


class GGUFCheckpoint:
    """What `qkern.load` asks of a checkpoint, of a GGUF file; a context manager.

    Matrices of Q4_0, Q4_1 and Q8_0 are read as they are; of other types their decoded values.

    Parameters
    ----------
    path : str or Path
        The file, or a part of a split one.

    Attributes
    ----------
    folder : Path
        The file.
    entries : tuple of str
        Names of the linear layers that stay quantized.
    embedding : str or None
        Name of the embedding if it stays quantized.
    plain : list of str
        Names of all other tensors.
    tensors : Mapping
        Those tensors by name, read when they are asked for.

    Raises
    ------
    InputError
        If there is no such file.
    FormatError
        If it is damaged, or its tensors are not those of its architecture.
    UnsupportedError
        If the architecture or a type is not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = GGUFFile(path)
        self.folder = self.file.path
        kind = self.file.metadata.get("general.type", "model")
        if kind != "model":
            raise InputError(f"{self.folder} is no model: its general.type is {kind!r:.60}")
        architecture = self.file.metadata.get("general.architecture")
        if architecture not in _READ:
            raise UnsupportedError(
                f"{self.folder} has architecture {architecture!r:.60}: read are {', '.join(_READ)}; "
                "llama.cpp may run it"
            )
        self._architecture = ARCHITECTURES[architecture]
        self.config = self._read_config()
        self._infos = self._match_tensors()
        matrices = [name.removesuffix(".weight") for name, info in self._infos.items() if _stays(info)]
        self.embedding = _EMBEDDING if _EMBEDDING in matrices else None
        self.entries = tuple(name for name in matrices if name != _EMBEDDING)
        quantized = {f"{name}.weight" for name in matrices}
        self.plain = [name for name in self._infos if name not in quantized]
        self.tensors: Mapping[str, Tensor] = _Tensors(self, self.plain)
        self._say_what_is_decoded()

    # The configuration -----------------------------------------------------------------------------------

    def _read_config(self) -> dict[str, Any]:
        file = self.file
        name, metadata, tensors = self._architecture.name, file.metadata, file.tensors
        if metadata.get(f"{name}.expert_count"):
            raise UnsupportedError(
                f"{file.path} has a mixture of experts, which is not loaded; llama.cpp runs it"
            )
        heads = self._integer("attention.head_count")
        hidden = self._integer("embedding_length")
        head = self._integer("attention.key_length", default=hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._integer(key, default=head) != head:
                raise UnsupportedError(
                    f"{file.path}: {name}.{key} is not the {head} of a head: such a {name} is not loaded; "
                    "llama.cpp runs it"
                )
        # Files of models without grouped queries may leave it out.
        keys = self._integer("attention.head_count_kv", default=heads)
        if heads % keys or head % 2:
            raise FormatError(
                f"{file.path}: {heads} query heads of {head} for {keys} key heads: needed are a multiple of "
                "the key heads and an even length; fetch it again"
            )
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise FormatError(f"{file.path} has no token_embd.weight, the embedding; fetch it again")
        config = {
            "model_type": self._architecture.model_type,
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": file.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "head_dim": head,
            "hidden_act": "silu",
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._integer("context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "rope_parameters": self._rope(head),
        }
        if self._architecture.name != "qwen2":  # its biases are no choice
            config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        if self._architecture.name == "llama":
            config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            known = isinstance(token, int) and 0 <= token < embedding.shape[0]
            config[f"{role}_token_id"] = token if known else None
        return config

    def _integer(self, key: str, default: int | None = None) -> int:
        return self.file._integer(key, default)

    def _number(self, key: str, default: float | None = None) -> float:
        name = f"{self._architecture.name}.{key}"
        value = self.file.metadata.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise FormatError(f"{self.folder}: {name} must be a positive number: got {value!r:.60}")
        return float(value)

    def _rope(self, head: int) -> dict[str, Any]:
        rope = {"rope_theta": self._number("rope.freq_base", default=10000.0)}
        kind, factor = self._scaling()
        context = self._integer("context_length")
        if kind == "yarn" and (_FACTORS in self.file.tensors or factor < 1):
            raise UnsupportedError(
                f"{self.folder}: rotary scaling 'yarn' by {factor:g}, or with {_FACTORS}, is not loaded; "
                "llama.cpp may run it"
            )
        if _FACTORS in self.file.tensors:
            # Divisors of the frequencies, which Llama 3 files have; the same for short and long contexts.
            info = self.file.tensors[_FACTORS]
            factors = self.file[_FACTORS].decode() if info.shape == (head // 2,) else torch.zeros(1)
            if not bool((factors.isfinite() & (factors > 0)).all()):
                raise FormatError(
                    f"{self.folder}: {_FACTORS} must be {head // 2} positive numbers: got {info.shape}; "
                    "fetch it again"
                )
            both = dict.fromkeys(("short_factor", "long_factor"), (factors * factor).tolist())
            return {
                **rope,
                **both,
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            }
        if factor == 1:
            return {**rope, "rope_type": "default"}
        if kind == "yarn":
            original = self._integer("rope.scaling.original_context_length", default=context)
            rope["original_max_position_embeddings"] = original
        return {**rope, "rope_type": kind, "factor": factor}

    def _scaling(self) -> tuple[str, float]:
        """Kind of rotary scaling, linear where the file does not say, and its factor, 1 for none."""
        name, metadata = self._architecture.name, self.file.metadata
        kind = metadata.get(f"{name}.rope.scaling.type", "linear")
        if kind not in ("none", "linear", "yarn"):
            raise UnsupportedError(
                f"{self.folder}: rotary scaling {kind!r:.60} is not loaded: allowed are none, linear and "
                "yarn; llama.cpp may run it"
            )
        for key, allowed in _UNCHANGED.items():
            value = metadata.get(f"{name}.rope.scaling.{key}", allowed[0])
            if value not in allowed:
                raise UnsupportedError(
                    f"{self.folder}: rotary scaling with {key} {value!r:.60} is not loaded: allowed is "
                    f"{allowed[0]}; llama.cpp may run it"
                )
        # The second is what the oldest files call it.
        keys = [key for key in ("rope.scaling.factor", "rope.scale_linear") if f"{name}.{key}" in metadata]
        if kind == "none" or not keys or metadata[f"{name}.{keys[0]}"] == 0:
            return kind, 1.0
        return kind, self._number(keys[0])

    def transformers_config(self) -> Any:
        """Build the configuration that transformers makes the model of.

        Raises
        ------
        FormatError
            If transformers refuses it.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.for_model(**self.config, dtype=torch.float32)
        except Exception as error:  # its validators raise errors of several libraries
            raise FormatError(
                f"{self.folder}: transformers takes no {self.config['model_type']} model with the numbers of "
                f"this file: {' '.join(str(error).split())}"
            ) from error

    # The tensors -----------------------------------------------------------------------------------------

    def _match_tensors(self) -> dict[str, TensorInfo]:
        """Find the tensors by transformers' name; all must be there, and no other, in the right shape."""
        shapes = self._architecture.shapes(self.config, tied=self.config["tie_word_embeddings"])
        names = self._architecture.names(self.config)
        tensors = self.file.tensors
        expected = {names[name]: shape for name, shape in shapes.items()}
        problems = {
            "missing": [name for name in expected if name not in tensors],
            "left over": [name for name in tensors if name not in expected and name != _FACTORS],
            "of another shape": [
                f"{name} {tensors[name].shape} instead of {shape}"
                for name, shape in expected.items()
                if name in tensors and tensors[name].shape != shape
            ],
        }
        found = [f"{what} are {', '.join(which[:8])}" for what, which in problems.items() if which]
        if found:
            raise FormatError(
                f"{self.folder} has not the tensors of the {self._architecture.name} model that its metadata "
                f"describes: {'; '.join(found)}; fetch or export it again"
            )
        infos = {name: tensors[names[name]] for name in shapes}
        for info in infos.values():
            try:
                _ = info.type
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.folder}: tensor {info.name}: {error}") from None
        return infos

    def _say_what_is_decoded(self) -> None:
        infos = [self._infos[name] for name in self.plain]
        counts = Counter(info.type.name for info in infos if info.type.name not in _PLAIN)
        if counts:
            logger.warning(
                "%s: %d tensors are decoded (%s); of quantized types q4_0, q4_1 and q8_0 stay as they are",
                self.folder,
                counts.total(),
                ", ".join(f"{count} {name}" for name, count in counts.items()),
            )

    def type_of(self, name: str) -> str:
        """Type of a tensor in the file, by transformers' name, for example ``"q4_k"``."""
        return self._infos[name].type.name

    def file_name(self, name: str) -> str:
        """Return llama.cpp's name of a tensor, without ``.weight``, by transformers' name."""
        return self._infos[name].name.removesuffix(".weight")

    def weight(self, name: str) -> QuantizedWeight:
        """Read a layer that stays quantized, its rows in transformers' order.

        Raises
        ------
        FormatError
            If its scales have NaN or Inf.
        """
        full = f"{name}.weight"
        weight = quantized_of(self.file[self._infos[full].name])
        assert weight is not None
        numbers = (weight.scales, weight.offsets)
        if not all(bool(number.isfinite().all()) for number in numbers if number is not None):
            raise FormatError(
                f"{self.folder}: {self._infos[full].name} has NaN or Inf scales; fetch it again"
            )
        return map_rows(weight, lambda rows: self._in_model_order(full, rows))

    def _in_model_order(self, name: str, tensor: Tensor) -> Tensor:
        return self._architecture.from_file_order(name, tensor, self.config)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.entries, *self.plain))

    def close(self) -> None:
        """Close the file; what was read stays valid."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file that are not kept quantized, decoded to fp32, rows in transformers' order."""

    def __init__(self, owner: GGUFCheckpoint, names: list[str]) -> None:
        self._owner = owner
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        owner = self._owner
        return owner._in_model_order(name, owner.file[owner._infos[name].name].decode())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stays(info: TensorInfo) -> bool:
    """Whether a tensor is a matrix of a type that the neutral form holds."""
    return len(info.shape) == 2 and info.type.name in ("q4_0", "q4_1", "q8_0")
