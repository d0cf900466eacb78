"""llama.cpp on a GGUF file, through llama-cpp-python's own functions and nothing of its Python layer."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench_generate import ROOM, VOCABULARY, job_of, tokens_of

if TYPE_CHECKING:
    from contestant import Job

INSTALL = "pip install llama-cpp-python"


def VERSION() -> str:
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"


def prepare(case: dict[str, Any]) -> Job:
    import llama_cpp

    llama_cpp.llama_backend_init()
    path = str(Path(case["folder"]) / "model.gguf").encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    prompt = case["prompt"]
    parameters.n_ctx = prompt + ROOM
    parameters.n_batch = parameters.n_ubatch = prompt
    parameters.n_threads = parameters.n_threads_batch = case["threads"]
    context = llama_cpp.llama_init_from_model(model, parameters)
    memory = llama_cpp.llama_get_memory(context)
    ids = {count: (ctypes.c_int32 * count)(*tokens_of(count)[0].tolist()) for count in (prompt, 1)}

    def start() -> None:
        llama_cpp.llama_memory_clear(memory, True)

    def step(count: int) -> Any:
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids[count], count))
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        # Waits for the result, as the caller of a step does.
        return llama_cpp.llama_get_logits_ith(context, -1)

    start()
    logits = np.ctypeslib.as_array(step(prompt), shape=(VOCABULARY,)).copy()
    return job_of(case, start, step, logits)
