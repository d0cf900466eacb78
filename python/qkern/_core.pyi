"""Types of the native module; raw pointers are integers. A test compares both."""

from collections.abc import Sequence
from typing import Any

__version__: str
CUDA_BUILD: str
GPTQ_MAX_COLUMNS: int

class Linear:
    def __call__(
        self,
        x: int,
        dtype: int,
        M: int,
        row_stride: int,
        out: int,
        bias: int,
        bias_dtype: int,
        int8: bool,
        threads: int,
    ) -> None: ...
    def __init__(self, blob: int, bytes: int) -> None: ...
    def decode(
        self, out: int, dtype: int, out_stride: int, first_row: int, rows: int, threads: int
    ) -> None: ...
    @property
    def shape(self) -> tuple[int, int]: ...

class LinearGroup:
    def __call__(
        self,
        x: int,
        dtype: int,
        M: int,
        row_stride: int,
        outs: Sequence[int],
        biases: Sequence[tuple[int, int]],
        int8: bool,
        threads: int,
    ) -> None: ...
    def __init__(self, linears: Sequence[Linear]) -> None: ...

def active_tier() -> str: ...
def advise_large_pages(memory: int, bytes: int) -> None: ...
def compiled_tiers() -> list[str]: ...
def cpu_features() -> str: ...
def dequantize_groupwise(
    codes: int,
    begin: int,
    end: int,
    K: int,
    group_size: int,
    groups: int,
    bits: int,
    codebook: int,
    scale_dtype: int,
    scales: int,
    zeros: int,
    offsets: int,
    group_index: int,
    rows_per_scale: int,
    out_dtype: int,
    out: int,
    out_stride: int,
    threads: int,
) -> None: ...
def gguf_decode(type: int, raw: int, out: int, rows: int, K: int, threads: int) -> None: ...
def gguf_encode(type: int, x: int, importance: int, out: int, rows: int, K: int, threads: int) -> bool: ...
def gptq_gather(
    matrix: int,
    row_bytes: int,
    item_bytes: int,
    rows: int,
    N: int,
    columns: int,
    K: int,
    out: int,
    threads: int,
) -> None: ...
def gptq_product(
    a: int,
    a_stride: int,
    N: int,
    K: int,
    b: int,
    b_row_stride: int,
    b_column_stride: int,
    columns: int,
    base: int,
    base_stride: int,
    out: int,
    out_stride: int,
    fixed: bool,
    threads: int,
) -> bool: ...
def gptq_update(
    weight: int,
    weight_stride: int,
    N: int,
    B: int,
    hinv: int,
    scales: int,
    zeros: int,
    groups: int,
    group_index: int,
    bits: int,
    codebook: int,
    codes: int,
    codes_stride: int,
    errors: int,
    threads: int,
    origin: int = 0,
    origin_stride: int = 0,
    change: int = 0,
    change_stride: int = 0,
    losses: int = 0,
    candidate_scales: int = 0,
    candidates: int = 0,
    local: int = 0,
    fits: int = 0,
    scale_dtype: int = 0,
) -> None: ...
def int8_matmul(
    blob: int,
    bytes: int,
    N: int,
    K: int,
    codes: int,
    M: int,
    row_stride: int,
    scales: int,
    zeros: int,
    bias: int,
    bias_dtype: int,
    out: int,
    out_dtype: int,
    int_out: bool,
    threads: int,
) -> None: ...
def kernel_tier(op: str) -> str | None: ...
def pack_bits(
    codes: int, codes_stride: int, N: int, K: int, bits: int, layout: int, packed: int, threads: int
) -> int: ...
def pack_weight(
    blob: int,
    N: int,
    K: int,
    groups: int,
    bits: int,
    zero_kind: int,
    scale_dtype: int,
    per_tensor: bool,
    has_index: bool,
    group_start: int,
    permutation: int,
    codes: int,
    scales: int,
    zeros: int,
    table: int,
    scheme: str,
    extra: int,
    extra_bytes: int,
    threads: int,
) -> None: ...
def packed_bytes(
    N: int,
    K: int,
    groups: int,
    bits: int,
    zero_kind: int,
    scale_dtype: int,
    per_tensor: bool,
    group_start: int,
    permuted: bool,
    extra_bytes: int,
) -> int: ...
def packed_header(blob: int, bytes: int) -> dict[str, Any]: ...
def quantize_activations(
    x: int,
    dtype: int,
    M: int,
    K: int,
    row_stride: int,
    group_size: int,
    scale: int,
    zero: int,
    codes: int,
    scales: int,
    threads: int,
) -> None: ...
def quantize_groupwise(
    weight: int,
    dtype: int,
    N: int,
    K: int,
    row_stride: int,
    group_size: int,
    groups: int,
    bits: int,
    asymmetric: bool,
    codebook: int,
    search_mse: bool,
    importance: int,
    importance_stride: int,
    scale_dtype: int,
    scales: int,
    zeros: int,
    grid_given: bool,
    rows_per_grid: int,
    codes: int,
    threads: int,
) -> int: ...
def set_tier(name: str) -> bool: ...
def thread_pool() -> str: ...
def unpack_bits(
    codes: int, codes_stride: int, N: int, K: int, bits: int, layout: int, packed: int, threads: int
) -> None: ...
def unpack_weight(
    blob: int, bytes: int, codes: int, scales: int, zeros: int, group_index: int, threads: int
) -> None: ...
def usable_tiers() -> list[str]: ...
