"""GPTQ and AWQ against words that were derived by hand; the derivation is in the golden files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qkern.checkpoints import FORMATS, Entry
from qkern.errors import UnsupportedError
from qkern.schemes import QuantizedWeight, Scheme

GOLDEN = Path(__file__).parent / "golden"
GPTQ = json.loads((GOLDEN / "gptq.json").read_text())
AWQ = json.loads((GOLDEN / "awq.json").read_text())
SIZE = 32


def words(rows: list[list[str]]) -> torch.Tensor:
    unsigned = torch.tensor([[int(word, 16) for word in row] for row in rows], dtype=torch.int64)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def gptq_file(case: dict, version: str) -> dict[str, torch.Tensor]:
    groups = 2 if case["group_size"] == 16 else 1
    columns = [case["odd"] if n % 2 else case["even"] for n in range(SIZE)]
    scale = torch.tensor([0.5, -0.25][:groups], dtype=torch.float16)
    if case["act_order"]:
        index = torch.tensor([1, 0] * (SIZE // 2), dtype=torch.int32)
    else:
        index = torch.tensor([k // 16 if groups == 2 else 0 for k in range(SIZE)], dtype=torch.int32)
    return {
        "m.qweight": words(columns).t().contiguous(),
        "m.qzeros": words([case["qzeros"][version]] * groups),
        "m.scales": scale[:, None].expand(groups, SIZE).contiguous(),
        "m.g_idx": index,
    }


def gptq_config(case: dict, version: str) -> dict:
    return {
        "quant_method": "gptq",
        "bits": case["bits"],
        "group_size": case["group_size"],
        "sym": case["sym"],
        "desc_act": case["act_order"],
        "checkpoint_format": version,
    }


def dense(qw: QuantizedWeight) -> torch.Tensor:
    """The weight by the formula, one bit of the neutral stream at a time."""
    weight = torch.zeros(qw.shape)
    bits = qw.scheme.bits
    for n in range(qw.N):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(qw.codes[n]))
        for k in range(qw.K):
            q = (stream >> (k * bits)) & (2**bits - 1)
            g = k // qw.scheme.group_length(qw.K) if qw.group_index is None else int(qw.group_index[k])
            z = qw.scheme.midpoint if qw.zeros is None else int(qw.zeros[n, g])
            weight[n, k] = (q - z) * float(qw.scales[n, g])
    return weight


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("case", GPTQ["cases"], ids=lambda case: case["name"])
def test_gptq_reads_and_writes_the_golden_words(case: dict, version: str) -> None:
    fmt = FORMATS[version]
    tensors = gptq_file(case, version)
    qw = fmt.decode("m", tensors, fmt.entry_of(gptq_config(case, version))("m"))
    assert qw.shape == (SIZE, SIZE)
    assert qw.scheme == Scheme(
        bits=case["bits"],
        group_size=None if case["group_size"] == -1 else case["group_size"],
        zero_point=not case["sym"],
    )
    if not case["sym"]:
        assert qw.zeros is not None
        assert qw.zeros[:8, 0].tolist() == case["zeros"]
    assert (qw.group_index is not None) == case["act_order"]
    weight = dense(qw)
    for n, k, value in case["entries"]:
        assert weight[n, k] == value, (n, k)
    written = fmt.encode("m", qw)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


def test_gptq_v1_zero_that_wrapped_is_read_per_field(caplog: pytest.LogCaptureFixture) -> None:
    wrapped = GPTQ["wrapped"]
    case = GPTQ["cases"][2] | {"group_size": -1, "qzeros": {"gptq": wrapped["qzeros"]}}
    fmt = FORMATS["gptq"]
    qw = fmt.decode("m", gptq_file(case, "gptq"), fmt.entry_of(gptq_config(case, "gptq"))("m"))
    assert qw.zeros is not None
    assert qw.zeros[:, 0].tolist() == wrapped["zeros"] * 4
    assert "wrapped" in caplog.text
    with pytest.raises(UnsupportedError, match="gptq_v2"):
        fmt.encode("m", qw)
    again = FORMATS["gptq_v2"].encode("m", qw)
    assert torch.equal(again["m.qzeros"], words([["76543210"] * 4]))


def test_awq_reads_and_writes_the_golden_words() -> None:
    fmt = FORMATS["awq"]
    scales = torch.tensor([[0.5] * 8 + [-0.25] * 8], dtype=torch.float16)
    tensors = {"m.qweight": words(AWQ["qweight"]), "m.qzeros": words(AWQ["qzeros"]), "m.scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": AWQ["group_size"], "zero_point": True}
    qw = fmt.decode("m", tensors, fmt.entry_of(config)("m"))
    assert qw.shape == (16, 2)
    assert [[word & 15, word >> 4 & 15] for word in qw.codes[:, 0].tolist()] == AWQ["codes"]
    assert qw.zeros is not None
    assert qw.zeros[:, 0].tolist() == AWQ["zeros"]
    weight = dense(qw)
    for n, k, value in AWQ["entries"]:
        assert weight[n, k] == value, (n, k)
    written = fmt.encode("m", qw)
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), name


def test_awq_of_a_symmetric_weight_stores_eights_and_reads_back_symmetric() -> None:
    fmt = FORMATS["awq"]
    qw = QuantizedWeight(
        codes=torch.arange(16, dtype=torch.int32)[:, None] * 17,
        scales=torch.full((16, 1), 0.5, dtype=torch.float16),
        shape=(16, 2),
        scheme=Scheme(bits=4, group_size=2),
    )
    written = fmt.encode("m", qw)
    assert torch.equal(written["m.qzeros"], words([["88888888", "88888888"]]))
    again = fmt.decode("m", written, Entry(scheme=Scheme(bits=4, group_size=2, zero_point=True)))
    assert again.scheme == qw.scheme
    assert torch.equal(again.codes, qw.codes)
