"""`QuantEmbedding`: a quantized table that is looked up by row, and used as an output head."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from qkern.errors import InputError, UnsupportedError
from qkern.nn.linear import COMPUTE, QuantLinear
from qkern.nn.state import FORM, QuantModule, weight_of
from qkern.ops import dequantize_groupwise, quantize_groupwise
from qkern.schemes import QuantizedWeight, Scheme, as_scheme

__all__ = ["QuantEmbedding", "TiedHead"]


class QuantEmbedding(QuantModule):
    """An embedding with a quantized table ``[V, H]``; a look-up dequantizes only the rows asked for.

    The table stays in its form-2 buffers. `as_linear` uses the same table as an output head; its packed
    copy is made at the first use and then lies beside the table.

    Make one with `from_embedding` or `from_quantized`.

    Parameters
    ----------
    scheme : Scheme
        Scheme of the table; groups run along H.
    num_embeddings, embedding_dim : int
        V and H.
    dtype : torch.dtype, optional
        Dtype of what a look-up returns; default: torch's default dtype. ``.to(dtype)`` changes it.
    """

    like: Tensor

    def __init__(
        self, scheme: Scheme, num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(scheme, num_embeddings, embedding_dim)
        # Follows .to(dtype) as a table would, and so remembers which dtype a look-up returns.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self._compute = "auto"
        self._heads: list[QuantLinear] = []

    @property
    def compute(self) -> str:
        """What `as_linear` does with activations; see `QuantLinear`."""
        return self._compute

    @compute.setter
    def compute(self, value: str) -> None:
        if value not in COMPUTE:
            raise InputError(f"unknown compute: got {value!r}, allowed are {', '.join(COMPUTE)}")
        self._compute = value
        for head in self._heads:
            head.compute = value

    @property
    def num_embeddings(self) -> int:
        """V, rows of the table."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """H, length of a row."""
        return self.in_features

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, scheme: Scheme | str, **quantize: Any) -> Self:
        """Quantize an embedding by rounding to the nearest code.

        Parameters
        ----------
        embedding : nn.Embedding
            Not a subclass: a subclass computes something else.
        scheme : Scheme or str
            For example ``"w4g64"``.
        **quantize
            Further arguments of `qkern.ops.quantize_groupwise`.

        Raises
        ------
        UnsupportedError
            On a subclass of nn.Embedding, or one with ``max_norm``.
        """
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise UnsupportedError(
                f"from_embedding takes a plain nn.Embedding without max_norm: got {type(embedding).__name__} "
                f"with max_norm={getattr(embedding, 'max_norm', None)}; leave it unquantized"
            )
        table = embedding.weight.detach()
        made = cls.from_quantized(quantize_groupwise(table, as_scheme(scheme), **quantize), dtype=table.dtype)
        made.train(embedding.training)
        return made

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, *, dtype: torch.dtype | None = None) -> Self:
        """Wrap a table that was quantized already; its tensors are shared.

        Parameters
        ----------
        weight : QuantizedWeight
            ``[V, H]``.
        dtype : torch.dtype, optional
            Dtype of what a look-up returns; default: torch's default dtype.
        """
        made = cls(weight.scheme, *weight.shape[-2:], dtype=dtype)
        made._adopt(weight)
        made.like = made.like.to(weight.device)
        return made

    def _forget(self) -> None:
        self._heads.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_heads": []}

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table for integer ids ``[...]``: ``[..., H]``.

        Raises
        ------
        InputError
            If `ids` are not int64 or int32, or on the CPU outside ``0..V-1``.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"ids have the wrong dtype: got {ids.dtype} {list(ids.shape)}, allowed are torch.int64 and "
                "torch.int32; convert them with ids.long() if they are row numbers"
            )
        dtype = self.like.dtype
        table = self._table()
        if ids.device.type == "meta" or table.device.type == "meta":
            return torch.empty(*ids.shape, self.embedding_dim, dtype=dtype, device="meta")
        rows = ids.reshape(-1)
        if torch.compiler.is_compiling():
            # Plain torch is what a tracer can see into; the values are the same.
            found = dequantize_groupwise(self._rows(table, rows), dtype, backend="reference")
        else:
            try:
                found = dequantize_groupwise(self._rows(table, rows), dtype)
            except IndexError:  # asked only now: looking at the ids before would cost every call
                low, high = int(rows.min()), int(rows.max())
                raise InputError(
                    f"ids are out of range: got {low} to {high}, allowed are 0 to {self.num_embeddings - 1}, "
                    "the rows of the table; check that tokenizer and model belong together"
                ) from None
        return found.reshape(*ids.shape, self.embedding_dim)

    def _table(self) -> QuantizedWeight:
        """Return what a look-up reads: of double-quantized scales the decoded ones alone."""
        if self.nested is None:
            return self.quantized()
        form = {name: self._buffers[name] for name in FORM}
        return weight_of({**form, "nested": None}, (self.out_features, self.in_features), self.scheme)

    def _rows(self, table: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
        """Part of the table with the rows ``[n]``."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            # Per tensor there is one scale, which serves whichever rows are picked.
            return tensor if tensor is None or self.scheme.per_tensor else tensor.index_select(0, rows)

        scales = pick(table.scales)
        assert scales is not None
        return QuantizedWeight(
            codes=table.codes.index_select(0, rows),
            scales=scales,
            shape=(rows.numel(), self.embedding_dim),
            scheme=self.scheme,
            zeros=pick(table.zeros),
            offsets=pick(table.offsets),
            group_index=table.group_index,
        )

    def as_linear(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., H]``: the table as a head without a bias."""
        if torch.compiler.is_compiling() or not self._heads:
            self._has_head_by_now()
        return self._heads[0](hidden)  # type: ignore[no-any-return]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _has_head_by_now(self) -> bool:
        # torch.compile runs this for real while it traces, then guards on the head that it made.
        if not self._heads:
            head = QuantLinear.from_quantized(self.quantized())
            head.compute = self._compute
            self._heads.append(head)
        return True

    def extra_repr(self) -> str:
        """Shape, scheme and dtype, for ``repr``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}, dtype={self.like.dtype}"


class TiedHead(nn.Module):
    """An output head that shares the table of a `QuantEmbedding`, to put in the place of ``lm_head``.

    It holds no tensors of its own, so the table is in the ``state_dict`` once, under the embedding's name.

    Parameters
    ----------
    embedding : QuantEmbedding
        The table.
    """

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        # In a tuple nn.Module does not register it as a child; copying keeps the tie.
        self._tied = (embedding,)

    @property
    def embedding(self) -> QuantEmbedding:
        """The table that is shared."""
        return self._tied[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., H]``."""
        return self.embedding.as_linear(hidden)
