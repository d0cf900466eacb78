"""GPTQModel's GPTQ of one linear from a Hessian that is given, on the CPU.

Its own defaults but for the order of columns (see bench_gptq.py). Timed as a whole, and without the
factorization of the Hessian: the column phase.
"""

from __future__ import annotations

import os
import time

# GPTQModel gives a small machine's CPU one worker and asks for two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from typing import TYPE_CHECKING, Any

from bench_gptq import job, layer, layer_loss

if TYPE_CHECKING:
    from contestant import Job

INSTALL = "pip install gptqmodel, or name a Python that has it with --gptqmodel-python"


def VERSION() -> str:
    from importlib.metadata import version

    from gptqmodel.quantization import GPTQ  # noqa: F401 - an ImportError here says that it is missing

    return f"GPTQModel {version('gptqmodel')}"


def prepare(case: dict[str, Any]) -> Job:
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization import GPTQ

    weight, hessian = layer(case["N"], case["K"])
    state: dict[str, Any] = {"factor": 0.0}

    def quantize() -> tuple[float, float]:
        linear = torch.nn.Linear(case["K"], case["N"], bias=False)
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        run = GPTQ(linear, QuantizeConfig(bits=4, group_size=128, desc_act=case["order"] == "desc_act"))
        run.quantizer.configure(perchannel=True)
        run.nsamples, run.H, run.fallback = 2048, hessian.clone(), None
        run.finalize_hessian = lambda target_device=None: run.H
        factorize = run.hessian_inverse

        def timed(H: Any) -> Any:
            begin = time.perf_counter()
            result = factorize(H)
            state["factor"] = time.perf_counter() - begin
            return result

        run.hessian_inverse = timed
        begin = time.perf_counter()
        state["weight"] = run.quantize()[0]
        return state["factor"], time.perf_counter() - begin

    quantize()
    lost = layer_loss(weight, state["weight"].float(), hessian)
    return job(quantize, lost, loss=float(f"{lost:.5g}"))
