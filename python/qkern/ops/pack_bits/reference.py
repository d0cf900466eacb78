"""pack_bits and unpack_bits in plain torch, any device; the layouts as formulas."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.errors import InputError

__all__ = ["AWQ_ORDER", "pack", "pack_dense", "split_last", "unpack", "unpack_dense"]

# Nibble i of an AWQ word holds output column 8c + AWQ_ORDER[i].
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def split_last(values: Tensor, size: int) -> Tensor:
    """Last dimension to pieces of `size`, filled with zeros: ``[..., ceil(K / size), size]``."""
    missing = -values.shape[-1] % size
    padded = F.pad(values, (0, missing)) if missing else values  # torch copies for a pad of nothing too
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size)


def _period(bits: int) -> tuple[int, int]:
    """Words, and codes in them, after which the bit stream lies in its words as at the start."""
    shared = math.gcd(bits, 32)
    return bits // shared, 32 // shared


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Little-endian bit stream along the last dimension."""
    K = codes.shape[-1]
    words, count = _period(bits)
    blocks = split_last(codes, count)
    packed = torch.zeros(*blocks.shape[:-1], words, dtype=torch.int32, device=codes.device)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        code = blocks[..., i].to(torch.int32)
        packed[..., word] |= code << shift
        if shift + bits > 32:
            packed[..., word + 1] |= code >> (32 - shift)
    return packed.flatten(-2)[..., : -(-K * bits // 32)].contiguous()


def unpack_dense(packed: Tensor, bits: int, K: int) -> Tensor:
    """Undo `pack_dense`: uint8 ``[..., K]``."""
    words, count = _period(bits)
    blocks = split_last(packed, words)
    codes = torch.empty(*blocks.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        kept = min(bits, 32 - shift)
        code = (blocks[..., word] >> shift) & ((1 << kept) - 1)
        if kept < bits:
            code |= (blocks[..., word + 1] & ((1 << (bits - kept)) - 1)) << kept
        codes[..., i] = code.to(torch.uint8)
    return codes.flatten(-2)[..., :K].contiguous()


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    per_word = 32 // bits
    blocks = split_last(codes, per_word).to(torch.int32)
    packed = torch.zeros_like(blocks[..., 0])
    for i in range(per_word):
        packed |= blocks[..., i] << (i * bits)
    return packed


def _unpack_words(packed: Tensor, bits: int, K: int) -> Tensor:
    mask = (1 << bits) - 1
    codes = torch.stack([(packed >> (i * bits)) & mask for i in range(32 // bits)], dim=-1)
    return codes.flatten(-2)[..., :K].to(torch.uint8).contiguous()


def pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    """Pack uint8 ``[N, K]``; arguments are validated by the caller."""
    if (codes >> bits).any():
        raise InputError(code_range_message(bits))
    if layout == "dense":
        return pack_dense(codes, bits)
    if layout == "gptq":
        return pack_dense(codes, bits).T.contiguous()
    if layout == "words":
        return _pack_words(codes, bits)
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    return _pack_words(split_last(codes.T, 8)[..., order].flatten(1), bits)


def unpack(packed: Tensor, bits: int, shape: tuple[int, int], layout: str) -> Tensor:
    """Unpack to uint8 ``[N, K]``; arguments are validated by the caller."""
    N, K = shape
    if layout == "dense":
        return unpack_dense(packed, bits, K)
    if layout == "gptq":
        return unpack_dense(packed.T, bits, K)
    if layout == "words":
        return _unpack_words(packed, bits, K)
    inverse = torch.tensor(AWQ_ORDER, device=packed.device).argsort()
    nibbles = split_last(_unpack_words(packed, bits, N), 8)
    return nibbles[..., inverse].flatten(1).T.contiguous()


def code_range_message(bits: int) -> str:
    """Say that a code does not fit."""
    return f"codes must be below 2**bits = {1 << bits}: got a larger one; choose more bits or clamp the codes"
