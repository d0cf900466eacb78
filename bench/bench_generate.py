"""Tokens a second of a whole model beside llama.cpp: prompts and single tokens, the same sizes.

    python bench/bench_generate.py [--threads 2] [--layers 24] [--prompt 512]

A model of Qwen2.5-0.5B's shape is made on the spot, with random weights. qkern runs it at w4g128 with the
table of tokens, which is the head too, at w8 through QuantEmbedding; llama.cpp runs the Q4_0 file that qkern
exports of it (its head is Q8_0, as K-quants do not fit 896 columns). ``eager`` is transformers as it is,
``compiled`` the whole step through torch.compile; both keep a static cache. A decode step follows --prompt
tokens in the cache.
Activations are fp32, as in llama.cpp. Logits are checked against a dense model with the weights of each.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
from contestant import Job, relative_error
from table import VERSION, tier

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["VERSION", "prepare"]

STEPS = 16  # single tokens that one run of decode takes the time of
ROOM = 64
VOCABULARY = 151936
# int8 activations of 169 layers one after the other, in either library.
ALLOWED = 0.1


def make_folder(folder: Path, layers: int) -> None:
    """Write a model of Qwen2.5-0.5B's shape, with the tokenizer of the model that qkern ships."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import qkern.demo

    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        rope_theta=1e6,
        tie_word_embeddings=True,
        dtype=torch.float16,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).half().save_pretrained(folder)
    shipped = Path(next(iter(qkern.demo.__path__))) / "data" / "bible"
    for file in shipped.glob("tokenizer*"):
        shutil.copy(file, folder)


def tokens_of(count: int) -> Any:
    import torch

    # Ids that the shipped tokenizer has.
    return torch.randint(300, 1000, (1, count), generator=torch.Generator().manual_seed(0))


def job_of(case: dict[str, Any], start: Callable[[], Any], step: Callable[[int], Any], logits: Any) -> Job:
    """Time `step` over the prompt, or over single tokens after it; `logits` are those after the prompt."""
    prompt = case["prompt"]

    def call() -> float:
        start()
        if case["what"] == "decode":
            step(prompt)
            begin = time.perf_counter()
            for _ in range(STEPS):
                step(1)
            return (time.perf_counter() - begin) / STEPS
        begin = time.perf_counter()
        step(prompt)
        return time.perf_counter() - begin

    import torch

    truth = torch.load(Path(case["folder"]) / f"{case['variant'].split()[0]}.pt")
    error = relative_error(torch.as_tensor(logits).flatten(), truth)
    call()
    return Job(calls=[call], error=error, allowed=ALLOWED, own_clock=True)


def quantized(folder: Path) -> Any:
    """Load the model with linears at w4g128, and the table that is the head at w8."""
    import torch
    from transformers import AutoModelForCausalLM

    from qkern import QuantEmbedding, replace_linears
    from qkern.nn import TiedHead

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table = QuantEmbedding.from_embedding(model.model.embed_tokens, "w8")
    model.model.embed_tokens, model.lm_head = table, TiedHead(table)
    replace_linears(model, "w4g128")
    return model


def prepare(case: dict[str, Any]) -> Job:
    import torch

    with torch.inference_mode():
        return qkern_job(case)


def qkern_job(case: dict[str, Any]) -> Job:
    # Keys and values of grouped queries as they are in the cache, instead of repeated for every query head.
    os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
    import torch
    from transformers import StaticCache

    from qkern import fuse_forwards

    model = quantized(Path(case["folder"]))
    fuse_forwards(model)
    prompt = case["prompt"]
    cache = StaticCache(config=model.config, max_cache_len=prompt + ROOM)
    ids = {prompt: tokens_of(prompt), 1: tokens_of(1)}
    place = {"at": 0}

    def forward(tokens: Any, positions: Any) -> Any:
        return model(
            tokens,
            past_key_values=cache,
            cache_position=positions,
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=1,
        ).logits

    run = forward
    model(tokens_of(2), use_cache=False)  # packs
    if case["variant"] == "qkern compiled":
        # No checks in a step: nobody changes the model or the shape of its input between two of them. What is
        # compiled belongs to a code object, so each variant has its own.
        forward.__code__ = forward.__code__.replace()
        forward(ids[1], torch.arange(1))  # makes the cache
        options = {
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            "size_asserts": False,
            "alignment_asserts": False,
        }
        run = torch.compile(forward, fullgraph=True, dynamic=False, options=options)

    @torch.inference_mode()
    def start() -> None:
        cache.reset()
        place["at"] = 0

    @torch.inference_mode()
    def step(count: int) -> Any:
        # Single tokens only are compiled when decoding is timed: the prompt runs as it is.
        chosen = run if (count == 1) == (case["what"] == "decode") else forward
        positions = torch.arange(place["at"], place["at"] + count)
        place["at"] += count
        return chosen(ids[count], positions)

    start()
    logits = step(prompt)[0, -1]
    if case["what"] == "decode":
        # The prompt did not go through what decode compiles: a single token does, and then as it is.
        compiled = step(1)
        start()
        step(prompt)
        error = relative_error(compiled, forward(ids[1], torch.arange(prompt, prompt + 1)))
        if not error <= ALLOWED:
            raise RuntimeError(f"a compiled step differs from an eager one by {error:.2g}")
    made = job_of(case, start, step, logits)
    made.facts = {"tier": tier()}
    return made


def write_truth(folder: Path, prompt: int) -> None:
    """Write the logits of dense models with the weights that qkern and that llama.cpp multiply by."""
    import torch
    from transformers import AutoModelForCausalLM

    import gguf
    from qkern.nn import quant_linears
    from qkern.ops import dequantize_groupwise

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def write(name: str) -> None:
        with torch.no_grad():
            logits = model(tokens_of(prompt), logits_to_keep=1).logits
        torch.save(logits[0, -1].clone(), folder / f"{name}.pt")

    def put(name: str, weight: Any) -> None:
        model.get_parameter(f"{name}.weight").data.copy_(weight)

    packed = quantized(folder)
    for name, linear in quant_linears(packed).items():
        put(name, dequantize_groupwise(linear.quantized(), backend="reference"))
    put(
        "model.embed_tokens", dequantize_groupwise(packed.model.embed_tokens.quantized(), backend="reference")
    )
    write("qkern")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, len(model.model.layers))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    for name in [*quant_linears(packed), "model.embed_tokens"]:
        tensor = stored[f"{names.get_name(name)}.weight"]
        put(name, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)))
    write("llama.cpp")


def main(arguments: list[str] | None = None) -> None:
    made = measure.parser(__doc__)
    made.add_argument("--layers", type=int, default=24)
    made.add_argument("--prompt", type=int, default=512)
    made.add_argument("--model", type=Path, help="folder to keep the model in")
    made.set_defaults(rounds=7, seconds=0.0)
    options = measure.parse(made, arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary)
        if not (folder / "model.gguf").exists():
            import qkern

            folder.mkdir(parents=True, exist_ok=True)
            make_folder(folder, options.layers)
            qkern.export_gguf(folder, folder / "model.gguf", type="q4_0")
        write_truth(folder, options.prompt)
        entries = [("bench_generate", "qkern eager"), ("bench_generate", "qkern compiled")]
        entries += [] if options.no_peers else [("peers.llama_cpp_generate", "llama.cpp q4_0")]
        shared = {"folder": str(folder), "prompt": options.prompt}
        contestants = [
            measure.Contestant(
                name=f"{variant}, {what}",
                module=module,
                tier=options.tier if module == "bench_generate" else None,
                case={"variant": variant, "what": what, **shared},
            )
            for what in ("decode", "prefill")
            for module, variant in entries
        ]
        results = measure.race(contestants, options)
    for result in results:
        result.contestant.case.pop("folder")
    group = {"shape": f"Qwen2.5-0.5B, {options.layers} layers, prompt {options.prompt}", "scheme": "w4g128"}
    records = measure.records("generate", results, options, **group, forced=options.tier)
    print(f"{group['shape']}, {options.threads} threads")
    for record in records:
        if "seconds" not in record:
            print(f"{record['contestant']:26}{record['absent']}")
            continue
        tokens = options.prompt if record["case"]["what"] == "prefill" else 1
        rate = tokens / record["seconds"]
        print(f"{record['contestant']:26}{rate:9.1f} tokens/s  {1e3 * record['seconds']:9.2f} ms")
    print(max(record.get("others", 0.0) for record in records), "cores used by others")
    measure.save(records, options)


if __name__ == "__main__":
    main()
