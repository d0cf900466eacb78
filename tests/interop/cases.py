"""What is made, by whom, and how.

The shipped model has 28 linears, of 128 to 512 rows and 256 or 512 columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LAYERS = range(4)
ATTENTION = [f"model.layers.{i}.self_attn.{name}_proj" for i in LAYERS for name in "qkvo"]
MLP = [f"model.layers.{i}.mlp.{name}_proj" for i in LAYERS for name in ("gate", "up", "down")]
DOWN = [name for name in MLP if name.endswith("down_proj")]


@dataclass(frozen=True)
class Case:
    """A checkpoint.

    Parameters
    ----------
    name : str
        For the table.
    peer : str
        Whose process makes or reads it: a requirements file's name.
    make : mapping
        How the peer makes it; for one of qkern's, arguments of `qkern.quantize`.
    ours : bool
        qkern makes it.
    int8 : bool
        Activations are quantized too: each reader's logits have the error of int8, not of a dtype.
    """

    name: str
    peer: str
    make: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    int8: bool = False

    @property
    def bitsandbytes(self) -> bool:
        """Whether the format is that of bitsandbytes."""
        return self.name.startswith("bitsandbytes")

    @property
    def folder(self) -> str:
        """Name of the folder, from all of `name`."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.name).split()
        return "-".join(["qkern" if self.ours else "peer", *words])


# What peers make ----------------------------------------------------------------------------------------


def gptqmodel(name: str, **config: Any) -> Case:
    return Case(name, "gptqmodel", {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, **config})


def llm_compressor(name: str, *, int8: bool = False, **modifiers: dict[str, Any]) -> Case:
    # Those that quantize do so to all linears but the head, unless a case says otherwise.
    common = {"targets": ["Linear"], "ignore": ["lm_head"]}
    quantizers = ("QuantizationModifier", "GPTQModifier")
    recipe = {
        kind: common | options if kind in quantizers else options for kind, options in modifiers.items()
    }
    return Case(
        f"compressed-tensors {name}", "transformers", {"by": "llm-compressor", "recipe": recipe}, int8=int8
    )


def bitsandbytes(name: str, *, int8: bool = False, **config: Any) -> Case:
    return Case(f"bitsandbytes {name}", "transformers", {"by": "bitsandbytes", **config}, int8=int8)


def weights(bits: int, group: int, **options: Any) -> dict[str, Any]:
    """Arguments that compressed-tensors has for the weights of a group of layers."""
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, **options}


FROM_PEERS = [
    *(gptqmodel(f"GPTQ v1, w{bits}g128", bits=bits) for bits in (2, 3, 4, 8)),
    gptqmodel("GPTQ v1, w4g128, desc_act", desc_act=True, act_group_aware=False),
    gptqmodel("GPTQ v1, w4g32", group_size=32),
    gptqmodel("GPTQ v1, w4, a scale a row", group_size=-1, act_group_aware=False),
    gptqmodel("GPTQ v1, w4g128z", sym=False),
    gptqmodel("GPTQ v2, w4g128", format="gptq_v2"),
    *(gptqmodel(f"GPTQ v2, w{bits}g128z", bits=bits, sym=False, format="gptq_v2") for bits in (2, 3, 4, 8)),
    gptqmodel(
        "GPTQ v2, w3g128z, desc_act",
        bits=3,
        sym=False,
        desc_act=True,
        act_group_aware=False,
        format="gptq_v2",
    ),
    gptqmodel(
        "GPTQ v1, dynamic: w4g128, down_proj w8g64, o_proj 16-bit",
        dynamic={r"+:.*\.down_proj$": {"bits": 8, "group_size": 64}, r"-:.*\.o_proj$": {}},
    ),
    gptqmodel("AWQ w4g128z", method="awq", format="gemm", sym=False),
    gptqmodel("AWQ w4g32", method="awq", format="gemm", group_size=32),
    *(
        llm_compressor(f"w{bits}g128, rounded", QuantizationModifier={"scheme": f"W{bits}A16"})
        for bits in (2, 3, 4, 8)
    ),
    llm_compressor("w4g128, GPTQ", GPTQModifier={"scheme": "W4A16"}),
    llm_compressor("w4g128, GPTQ, actorder static", GPTQModifier={"scheme": "W4A16", "actorder": "static"}),
    llm_compressor("w4g128z, GPTQ", GPTQModifier={"scheme": "W4A16_ASYM"}),
    llm_compressor(
        "mixed: w4g128, mlp w8g64z",
        QuantizationModifier={
            "targets": [],
            "config_groups": {
                "a": {"targets": [r"re:.*self_attn\..*"], "weights": weights(4, 128)},
                "b": {"targets": [r"re:.*mlp\..*"], "weights": weights(8, 64, symmetric=False)},
            },
        },
    ),
    llm_compressor("w8a8", int8=True, QuantizationModifier={"scheme": "W8A8"}),
    llm_compressor(
        "w8a8, SmoothQuant, GPTQ",
        int8=True,
        SmoothQuantModifier={"smoothing_strength": 0.5},
        GPTQModifier={"scheme": "W8A8"},
    ),
    llm_compressor(
        "w8a8, static",
        int8=True,
        QuantizationModifier={
            "targets": [],
            "config_groups": {
                "a": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "strategy": "channel"},
                    "input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
                }
            },
        },
    ),
    *(
        bitsandbytes(
            f"{kind}, {'double quantization' if nested else 'fp32 scales'}",
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype="bfloat16",
        )
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    ),
    bitsandbytes("LLM.int8()", int8=True, load_in_8bit=True),
]

# What qkern makes ---------------------------------------------------------------------------------------


def ours(name: str, peer: str, format: str, scheme: str, method: str = "gptq", **options: Any) -> Case:
    make = {"format": format, "scheme": scheme, "method": method, **options}
    return Case(name, peer, make, ours=True, int8=scheme.endswith("a8"))


def packed(scheme: str, note: str = "", method: str = "gptq", **options: Any) -> Case:
    name = f"compressed-tensors {scheme}{note}"
    return ours(name, "transformers", "compressed-tensors", scheme, method, **options)


MIXED = {**dict.fromkeys(ATTENTION, "w4g128"), **dict.fromkeys(MLP, "w3g64"), **dict.fromkeys(DOWN, "w8g32")}

FROM_QKERN = [
    *(ours(f"GPTQ v1, w{bits}g128", "gptqmodel", "gptq", f"w{bits}g128") for bits in (2, 3, 4, 8)),
    ours("GPTQ v1, w4g128, desc_act", "gptqmodel", "gptq", "w4g128", act_order="desc_act"),
    ours("GPTQ v1, w4, a scale a row", "gptqmodel", "gptq", "w4"),
    *(ours(f"GPTQ v2, w{bits}g128z", "gptqmodel", "gptq_v2", f"w{bits}g128z") for bits in (2, 3, 4, 8)),
    ours("GPTQ v2, w3g128z, desc_act", "gptqmodel", "gptq_v2", "w3g128z", act_order="desc_act"),
    ours("GPTQ v1, dynamic: w4g128, mlp w3g64, down_proj w8g32", "gptqmodel", "gptq", "", assignment=MIXED),
    ours("AWQ w4g128z", "gptqmodel", "awq", "w4g128z", "awq"),
    ours("AWQ w4g32", "gptqmodel", "awq", "w4g32", "awq"),
    *(packed(f"w{bits}g128") for bits in (2, 3, 4, 8)),
    packed("w4g128z"),
    packed("w8g64z"),
    packed("w4"),
    ours(
        "compressed-tensors mixed: w4g128, mlp w3g64, down_proj w8g32",
        "transformers",
        "compressed-tensors",
        "",
        assignment=MIXED,
    ),
    packed("w8a8", method="smoothquant"),
    packed("w8a8", ", static", method="smoothquant", activations="static"),
    *(
        ours(f"bitsandbytes {s}", "transformers", "bitsandbytes", s, "rtn")
        for s in ("nf4g64", "nf4g64d", "fp4g64d")
    ),
    Case("bitsandbytes LLM.int8()", "transformers", {"int8": True}, ours=True, int8=True),
]
