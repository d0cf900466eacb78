"""dequant_matmul as others call it: the eager handle, the torch op, blobs and arguments that are wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from qkern.errors import InputError, UnsupportedError
from qkern.ops import (
    dequant_matmul,
    dequantize_groupwise,
    pack_weight,
    quantize_groupwise,
    unpack_weight,
)
from qkern.ops.dequant_matmul import LinearHandle, resolve_compute
from qkern.schemes import FLOAT_DTYPES, PackedWeight, QuantizedWeight, Scheme


def weight(shape: tuple[int, int], spelling: str, *, act_order: bool = False) -> QuantizedWeight:
    g = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    qw = quantize_groupwise(torch.randn(shape, generator=g) * 0.25, spelling, backend="reference")
    if act_order:
        groups = torch.randint(0, qw.scales.shape[1], (qw.K,), generator=g)
        qw = replace(qw, group_index=groups.int())
    return qw


def exact_weight(qw: QuantizedWeight) -> torch.Tensor:
    return dequantize_groupwise(qw, backend="reference").double()


def activations(M: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M + 7 * K)).to(dtype)


# ---- the handle, the torch op --------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_handle_equals_the_op(cpu_tier, compute):
    packed = pack_weight(weight((37, 96), "w4g32z"))
    handle = LinearHandle(packed)
    for shape in ((96,), (5, 96), (2, 3, 96), (0, 96), (40, 96)):
        for dtype in FLOAT_DTYPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            for bias in (None, torch.arange(37, dtype=dtype)):
                expected = dequant_matmul(x, packed, bias, compute=compute)
                assert torch.equal(handle(x, bias, compute), expected)


def test_handle_keeps_the_blob_alive():
    handle = LinearHandle(pack_weight(weight((64, 128), "w4g32")))
    x = activations(2, 128)
    first = handle(x)
    for _ in range(8):
        torch.full((1 << 20,), 255, dtype=torch.uint8)
    assert torch.equal(handle(x), first)


def test_handle_follows_a_blob_that_moves():
    packed = pack_weight(weight((512, 512), "w4g32"))
    handle, x = LinearHandle(packed), activations(2, 512)
    expected, address = handle(x), packed.blob.data_ptr()
    packed.blob.share_memory_()
    assert packed.blob.data_ptr() != address
    # The old memory is free: what takes its place must not be read.
    taken = [torch.full((packed.blob.numel(),), 7, dtype=torch.uint8) for _ in range(50)]
    assert torch.equal(handle(x), expected)
    assert taken[0][0] == 7


def test_handle_says_what_is_wrong():
    handle = LinearHandle(pack_weight(weight((8, 16), "w4")))
    for x, what in (
        (torch.ones(2, 17), r"shape: got \[2, 17\], allowed is \[\.\.\., 16\]"),
        (torch.tensor(1.0), r"shape: got \[\]"),
        (torch.ones(2, 16, dtype=torch.float64), r"dtype: got torch\.float64"),
        (torch.ones(2, 16, device="meta"), "device: got meta, allowed is cpu"),
    ):
        with pytest.raises(InputError, match=f"wrong {what}"):
            handle(x)
    with pytest.raises(InputError, match="bias must be"):
        handle(torch.ones(2, 16), torch.ones(7))
    with pytest.raises(InputError, match="unknown compute"):
        handle(torch.ones(2, 16), None, "fp8")
    with pytest.raises(InputError, match="pack with backend='cpu'"):
        LinearHandle(pack_weight(weight((8, 16), "w4"), backend="reference"))


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("compute", ["float", "int8"])
def test_opcheck(backend_name, compute):
    packed = pack_weight(weight((24, 32), "w4g16z"), backend=backend_name)
    static = (packed.layout, packed.N, packed.K, str(packed.scheme))
    for x in (activations(3, 32).requires_grad_(), activations(6, 32, torch.bfloat16).view(2, 3, 32)):
        for bias in (None, torch.ones(24, dtype=x.dtype, requires_grad=x.requires_grad)):
            torch.library.opcheck(torch.ops.qkern.dequant_matmul, (x, packed.blob, bias, *static, compute))
    grad = activations(3, 24).requires_grad_()
    torch.library.opcheck(torch.ops.qkern.dequant_matmul_backward, (grad, packed.blob, *static))


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("compute", ["float", "int8"])
def test_group_is_its_parts(backend_name, compute):
    schemes, rows = ("w4g16z", "w4g16z", "w8g16z"), (24, 16, 40)
    packed = [
        pack_weight(weight((n, 32), scheme), backend=backend_name)
        for n, scheme in zip(rows, schemes, strict=True)
    ]
    x = activations(3, 32, torch.bfloat16)
    biases = [torch.ones(24), None, torch.full((40,), 2.0, dtype=torch.bfloat16)]
    for count in (2, 3):  # the third is of other bits: no call for all of them
        chosen = packed[:count]
        arguments = (
            x,
            [one.blob for one in chosen],
            biases[:count],
            chosen[0].layout,
            [one.N for one in chosen],
            32,
            [str(one.scheme) for one in chosen],
            compute,
        )
        torch.library.opcheck(torch.ops.qkern.dequant_matmul_group, arguments)
        outs = torch.ops.qkern.dequant_matmul_group(*arguments)
        for out, one, bias in zip(outs, chosen, biases, strict=False):
            assert torch.equal(out, dequant_matmul(x, one, bias, compute=compute))


def test_group_gradients():
    weights = [weight((n, 32), "w4g16") for n in (24, 16)]
    packed = [pack_weight(qw, backend="cpu") for qw in weights]
    x = activations(3, 32).requires_grad_()
    biases = [torch.zeros(24), None]
    outs = torch.ops.qkern.dequant_matmul_group(
        x, [one.blob for one in packed], biases, packed[0].layout, [24, 16], 32, ["w4g16"] * 2, "float"
    )
    upstream = [activations(3, 24), activations(3, 16)]
    (grad_x,) = torch.autograd.grad(outs, x, upstream)
    expected = sum(up @ exact_weight(qw).float() for up, qw in zip(upstream, weights, strict=True))
    torch.testing.assert_close(grad_x, expected)
    with pytest.raises(UnsupportedError, match="no gradient for a bias"):
        torch.ops.qkern.dequant_matmul_group(
            x,
            [packed[0].blob],
            [torch.zeros(24, requires_grad=True)],
            packed[0].layout,
            [24],
            32,
            ["w4g16"],
            "float",
        )


def test_a_blob_that_changed_is_read_again():
    first, second = (pack_weight(weight((24, 32), "w4g16")) for _ in range(2))
    x = activations(3, 32)
    before = dequant_matmul(x, first)
    first.blob[256] ^= 1  # the group table
    with pytest.raises(InputError, match="not sound"):
        dequant_matmul(x, first)
    assert torch.equal(dequant_matmul(x, second), before)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_gradients(backend_name):
    qw = weight((24, 40), "w4g16")
    packed, dense = pack_weight(qw, backend=backend_name), exact_weight(qw).float()
    x = activations(6, 40).view(2, 3, 40).requires_grad_()
    bias = torch.zeros(24, requires_grad=True)
    upstream = activations(6, 24).view(2, 3, 24)
    y = dequant_matmul(x, packed, bias)  # auto: float, because a gradient is taken
    torch.testing.assert_close(y, F.linear(x, dense, bias))
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), upstream, create_graph=True)
    torch.testing.assert_close(grad_x, upstream @ dense)
    torch.testing.assert_close(grad_bias, upstream.sum((0, 1)))
    leaf = upstream.clone().requires_grad_()
    y = dequant_matmul(x, packed)
    (first,) = torch.autograd.grad(y, x, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(second, 2 * (leaf.detach() @ dense) @ dense.T)


def test_gradient_through_int8_is_that_of_the_weight():
    qw = weight((24, 40), "w4g16")
    x = activations(3, 40, torch.bfloat16).requires_grad_()
    dequant_matmul(x, pack_weight(qw), compute="int8").sum().backward()
    expected = exact_weight(qw).sum(0).expand(3, 40).to(torch.bfloat16)
    torch.testing.assert_close(x.grad, expected)


def test_compiles_without_a_graph_break():
    packed = pack_weight(weight((24, 64), "w4g32"))
    bias = torch.ones(24)

    def step(x):
        return torch.relu(dequant_matmul(x * 2, packed, bias)) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (2, 3, 7):
        x = activations(M, 64)
        assert torch.equal(compiled(x), step(x))
        leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(leaf).sum().backward()
        step(plain).sum().backward()
        torch.testing.assert_close(leaf.grad, plain.grad)


def test_compute_auto():
    scheme, x = Scheme.parse("w4g32"), torch.ones(1, 32)
    assert resolve_compute("auto", x, scheme, needs_grad=False) == "int8"
    assert resolve_compute("auto", x, scheme, needs_grad=True) == "float"
    assert resolve_compute("auto", x, Scheme.parse("w8a8"), needs_grad=True) == "int8"
    assert resolve_compute("auto", torch.ones(1, 32, device="meta"), scheme, needs_grad=False) == "float"
    assert resolve_compute("float", x, Scheme.parse("w8a8"), needs_grad=False) == "float"


# ---- bad input -----------------------------------------------------------------------------------------


def test_errors():
    qw = weight((8, 16), "w4")
    packed = pack_weight(qw)
    x = torch.ones(2, 16)
    with pytest.raises(InputError, match=r"wrong shape: got \[2, 17\], allowed is \[\.\.\., 16\]"):
        dequant_matmul(torch.ones(2, 17), packed)
    with pytest.raises(InputError, match=r"wrong dtype: got torch\.float64 \[2, 16\], allowed are"):
        dequant_matmul(x.double(), packed)
    with pytest.raises(InputError, match="wrong device: got meta, allowed is cpu"):
        dequant_matmul(x.to("meta"), packed)
    with pytest.raises(InputError, match="bias is on the wrong device: got meta"):
        dequant_matmul(x, packed, torch.ones(8, device="meta"))
    with pytest.raises(InputError, match=r"bias must be \[8\]"):
        dequant_matmul(x, packed, torch.ones(9))
    with pytest.raises(InputError, match="unknown compute: got 'int4'"):
        dequant_matmul(x, packed, compute="int4")
    with pytest.raises(InputError, match="unknown backend"):
        dequant_matmul(x, packed, backend="tpu")
    with pytest.raises(UnsupportedError, match="cuda"):
        dequant_matmul(x, qw, backend="cuda")
    with pytest.raises(InputError, match="pack each expert"):
        pack_weight(
            QuantizedWeight(codes=qw.codes[None], scales=qw.scales[None], shape=(1, 8, 16), scheme=qw.scheme)
        )
    bad_index = weight((8, 16), "w4g4", act_order=True)
    with pytest.raises(InputError, match=r"group_index must lie in 0\.\.3"):
        pack_weight(replace(bad_index, group_index=torch.full((16,), 5, dtype=torch.int32)))


def test_named_backend_repacks():
    qw = weight((8, 48), "w4g16")
    x = activations(2, 48)
    native, plain = pack_weight(qw, backend="cpu"), pack_weight(qw, backend="reference")
    assert native.layout != plain.layout
    expected = dequant_matmul(x, plain, compute="float")
    assert torch.equal(dequant_matmul(x, native, compute="float", backend="reference"), expected)
    assert torch.equal(
        dequant_matmul(x, plain, compute="float", backend="cpu"), dequant_matmul(x, native, compute="float")
    )
    torch.testing.assert_close(dequant_matmul(x, qw, compute="float"), expected)


def corrupted(packed: PackedWeight, blob: torch.Tensor) -> PackedWeight:
    return replace(packed, blob=blob)


def use(packed: PackedWeight) -> None:
    unpack_weight(packed)
    for compute in ("float", "int8"):
        dequant_matmul(torch.ones(2, packed.K), packed, compute=compute)
        dequant_matmul(torch.ones(40, packed.K), packed, compute=compute)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_corrupt_blob_is_an_error_and_never_a_crash(act_order):
    packed = pack_weight(weight((70, 96), "w4g32z", act_order=act_order))
    use(packed)
    size = packed.blob.numel()
    for length in (0, 8, 255, 256, 300, size - 1):
        with pytest.raises(InputError, match="not sound"):
            use(corrupted(packed, packed.blob[:length].clone()))
    for change in ({"N": 71}, {"K": 95}):
        with pytest.raises(InputError):
            use(replace(packed, **change))
    with pytest.raises(InputError, match="not sound"):
        unpack_weight(replace(packed, scheme=Scheme.parse("w4g16z")))
    # Every byte of the header and of the tables behind it, each set to two values: an error or a sound blob.
    rejected = 0
    for at in range(160 if not act_order else 256 + 64 + 4 * packed.K):
        for value in (0xFF, 0x41):
            blob = packed.blob.clone()
            if blob[at] == value:
                continue
            blob[at] = value
            try:
                use(corrupted(packed, blob))
            except InputError:
                rejected += 1
    assert rejected > 100


def test_a_corrupt_codebook_is_an_error():
    packed = pack_weight(weight((8, 48), "nf4g16"))
    for value in (float("nan"), 2.0):
        blob = packed.blob.clone()
        blob[112:116] = torch.tensor([value]).view(torch.uint8)  # an entry of the table
        with pytest.raises(InputError, match=r"codebook leaves -1\.\.1"):
            use(corrupted(packed, blob))


@pytest.mark.parametrize("layout", ["reference", "cpu"])
def test_corrupt_second_level_scales_are_an_error(layout):
    qw = weight((21, 70), "nf4g64d")
    packed = pack_weight(qw, backend=layout)
    head = qw.nested.absmax.numel().to_bytes(8, "little")
    # The count is the last field of 24 bytes, and the table behind it starts with -1.
    whole = packed.blob.numpy().tobytes()
    at = whole.index(head + torch.tensor([float(qw.nested.table[0])]).numpy().tobytes())
    for count in (2**40, -1, 10**4):
        blob = packed.blob.clone()
        blob[at : at + 8] = torch.tensor([count]).view(torch.uint8)
        with pytest.raises(InputError, match="second-level scales exceed"):
            unpack_weight(corrupted(packed, blob))
    if layout == "cpu":
        blob = packed.blob.clone()
        extra_bytes = 88  # its place in qk::PackedHeader
        assert int.from_bytes(whole[extra_bytes : extra_bytes + 8], "little") > 1024
        for count in (1, 23, 30, 1000):
            blob[extra_bytes : extra_bytes + 8] = torch.tensor([count]).view(torch.uint8)
            with pytest.raises(InputError, match="second-level scales exceed"):
                unpack_weight(corrupted(packed, blob))


def test_a_corrupt_width_is_an_error_and_writes_nothing_beyond_the_codes():
    packed = pack_weight(weight((70, 96), "w8g32"))
    blob = packed.blob.clone()
    blob[12] = 4  # fewer bits: the panels still fit
    assert LinearHandle(corrupted(packed, blob)).N == 70
    with pytest.raises(InputError, match="codes of 4 bits, not those of w8g32"):
        unpack_weight(corrupted(packed, blob))


def test_a_group_index_may_name_several_groups_of_a_per_tensor_weight():
    plain = weight((20, 64), "w4t")
    qw = replace(
        plain,
        scales=torch.tensor([[0.1, 0.2, -0.3, 0.4]], dtype=torch.float16),
        group_index=(torch.arange(64) * 7 % 4).int(),
    )
    packed = pack_weight(qw)
    back = unpack_weight(packed)
    assert torch.equal(back.codes, qw.codes)
    assert torch.equal(back.scales, qw.scales)
    assert torch.equal(back.group_index, qw.group_index)
    decoded = dequant_matmul(torch.eye(64), packed, compute="float").T
    assert torch.equal(decoded, dequantize_groupwise(qw, backend="reference"))


def test_one_token_without_a_batch_has_a_gradient_for_its_bias():
    packed = pack_weight(weight((8, 16), "w4g16"))
    bias = torch.zeros(8, requires_grad=True)
    dequant_matmul(torch.randn(16), packed, bias).backward(torch.arange(8.0))
    assert torch.equal(bias.grad, torch.arange(8.0))


def test_a_corrupt_plain_blob_is_an_error():
    packed = pack_weight(weight((8, 48), "w4g16z"), backend="reference")
    with pytest.raises(InputError, match="too short"):
        use(corrupted(packed, packed.blob[:100]))
    with pytest.raises(InputError, match="unknown layout"):
        use(replace(packed, layout="cpu.k9"))


def test_quantized_by_the_library_end_to_end():
    g = torch.Generator().manual_seed(3)
    dense = torch.randn(72, 256, generator=g)
    x = torch.randn(5, 256, generator=g)
    for spelling, bound in (("w8g128", 0.012), ("w4g64z", 0.15), ("nf4g64", 0.15)):
        y = dequant_matmul(x, quantize_groupwise(dense, spelling))
        relative = float((y - x @ dense.T).norm() / (x @ dense.T).norm())
        assert relative < bound
