"""Train the small causal LMs that the tests, the demo and the quality tables rest on.

    python bench/models/train.py shipped --output python/qkern/demo/data/bible
    python bench/models/train.py technical --output models/technical

Writes a Hugging Face model folder in bf16 with its tokenizer, `calibration.txt`, `search.txt`,
`heldout.txt` and a model card. The texts come from Debian packages; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from card import model_card
from corpus import CORPORA, Corpus, MissingSourceError
from kneser_ney import Ints, KneserNey
from tokenizer import END_OF_TEXT, TURN_END, train_tokenizer
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the run with its own window length; `share` is of the steps."""

    share: float
    context: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model and the run that trains it."""

    corpus: str
    architecture: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    context: int
    steps: int
    stages: tuple[Stage, ...]
    dropout: float = 0.1
    matrix_lr: float = 4e-3
    matrix_decay: float = 0.2
    other_lr: float = 3e-3
    other_decay: float = 0.1
    warmup: float = 0.02
    cooldown: float = 0.5


PRESETS = {
    "shipped": Preset(
        corpus="bible",
        architecture="qwen2",
        vocab=2048,
        hidden=256,
        intermediate=512,
        layers=4,
        heads=4,
        kv_heads=2,
        tied=True,
        context=512,
        steps=2400,
        stages=(
            Stage(share=0.4, context=128, batch=32),
            Stage(share=0.6, context=512, batch=8),
        ),
        dropout=0.1,
    ),
    "technical": Preset(
        corpus="technical",
        architecture="llama",
        vocab=4096,
        hidden=512,
        intermediate=1024,
        layers=4,
        heads=8,
        kv_heads=4,
        tied=False,
        context=512,
        steps=700,
        stages=(
            Stage(share=0.5, context=128, batch=32),
            Stage(share=0.5, context=512, batch=8),
        ),
        dropout=0.0,
        matrix_decay=0.1,
    ),
    "smoke": Preset(
        corpus="sample",
        architecture="qwen2",
        vocab=512,
        hidden=64,
        intermediate=128,
        layers=2,
        heads=2,
        kv_heads=1,
        tied=True,
        context=64,
        steps=20,
        stages=(
            Stage(share=0.5, context=32, batch=8),
            Stage(share=0.5, context=64, batch=4),
        ),
    ),
}


def build_model(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the untrained model."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    shared = {
        "vocab_size": preset.vocab,
        "hidden_size": preset.hidden,
        "intermediate_size": preset.intermediate,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "max_position_embeddings": preset.context,
        "tie_word_embeddings": preset.tied,
        "rope_theta": 10000.0,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    model: PreTrainedModel
    if preset.architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shared))
    model.set_attn_implementation("eager")  # its backward pass is faster than SDPA's on a CPU
    model.generation_config = GenerationConfig(
        eos_token_id=[end, tokenizer.convert_tokens_to_ids(TURN_END)], pad_token_id=end
    )
    return model


def add_dropout(model: PreTrainedModel, p: float) -> None:
    """Drop channels of the embeddings and of what each block adds to the residual stream.

    One mask serves a whole window (Gal and Ghahramani, 2016): on a CPU a mask for each token costs
    a quarter of the step.
    """

    def drop(module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if not module.training:
            return output
        values = output[0] if isinstance(output, tuple) else output
        mask = torch.rand(values.shape[0], 1, values.shape[2]) >= p
        values = values * (mask.to(values.dtype) / (1 - p))
        return (values, *output[1:]) if isinstance(output, tuple) else values

    if p > 0:
        model.model.embed_tokens.register_forward_hook(drop)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(drop)
            layer.mlp.register_forward_hook(drop)


def make_optimizers(model: PreTrainedModel, preset: Preset) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and biases."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(
            matrices,
            lr=preset.matrix_lr,
            weight_decay=preset.matrix_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": [p for p in others if p.ndim == 2], "weight_decay": preset.other_decay},
                {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=preset.other_lr,
            betas=(0.9, 0.95),
            eps=1e-8,
        ),
    ]


def learning_rate_scale(step: int, steps: int, preset: Preset) -> float:
    """Trapezoid: linear warm-up, constant, linear to zero."""
    warmup = max(1, round(preset.warmup * steps))
    cooldown = max(1, round(preset.cooldown * steps))
    return min(1.0, (step + 1) / warmup, (steps - step) / cooldown)


def batches(stream: Tensor, context: int, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield `[batch, context + 1]` windows for ever: every epoch at a new offset and order."""
    context = min(context, len(stream) // (batch + 1) - 1)
    while True:
        offset = int(torch.randint(context, (1,), generator=rng))
        starts = torch.arange(offset, len(stream) - context, context)
        starts = starts[torch.randperm(len(starts), generator=rng)]
        for first in range(0, len(starts) - batch + 1, batch):
            chosen = starts[first : first + batch]
            yield stream[chosen[:, None] + torch.arange(context + 1)]


def train(model: PreTrainedModel, preset: Preset, stream: Tensor, check: Tensor, steps: int) -> None:
    """Run the stages; prints the loss on `check`, a text outside the training one, as it goes."""

    def loss_of(window: Tensor) -> Tensor:
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())

    compiled = torch.compile(loss_of, dynamic=False) if steps >= 200 else loss_of
    optimizers = make_optimizers(model, preset)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    rng = torch.Generator().manual_seed(SEED)
    ends = np.cumsum([stage.share for stage in preset.stages]) * steps
    step, started, running = 0, time.perf_counter(), 0.0
    for stage, end in zip(preset.stages, ends, strict=True):
        windows = batches(stream, stage.context, stage.batch, rng)
        while step < round(end):
            scale = learning_rate_scale(step, steps, preset)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                for group, lr in zip(optimizer.param_groups, rate, strict=True):
                    group["lr"] = lr * scale
            with torch.autocast("cpu", torch.bfloat16):
                loss = compiled(next(windows))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
            if step % 50 == 0 or step == steps:
                spent = time.perf_counter() - started
                note = f"step {step}/{steps} loss {running:.3f} {spent:.0f} s"
                if step % 250 == 0:
                    note += f" check {math.log(perplexity(model, check, preset.context)):.3f}"
                print(note, file=sys.stderr, flush=True)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor, context: int) -> float:
    """Perplexity over windows that do not overlap; the first token of each is not scored."""
    model.eval()
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    total = 0.0
    for chunk in windows.split(8):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum")
        total += float(losses)
    model.train()
    return math.exp(total / (len(windows) * (context - 1)))


def scored_positions(count: int, context: int) -> Ints:
    """Positions that `perplexity` scores in a text of `count` tokens."""
    positions = np.arange(count // context * context, dtype=np.int64)
    return positions[positions % context != 0]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the token ids of `text`, special tokens not added."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def save(output: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    """Write the model folder and its three texts."""
    output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # written for the owner only
    tokenizer.save_pretrained(output, save_jinja_files=False)
    settings = output / "tokenizer_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    settings.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    for name in ("calibration", "search", "heldout"):
        (output / f"{name}.txt").write_text(getattr(corpus, name), encoding="utf-8")


def run(name: str, output: Path, steps: int | None) -> dict[str, float]:
    """Make one model folder and return the figures of its card."""
    preset = PRESETS[name]
    steps = preset.steps if steps is None else steps
    torch.manual_seed(SEED)
    corpus = CORPORA[preset.corpus]()
    tokenizer = train_tokenizer(corpus.train, preset.vocab)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream = torch.cat([torch.cat([encode(tokenizer, text), torch.tensor([end])]) for text in corpus.train])
    search, heldout = encode(tokenizer, corpus.search), encode(tokenizer, corpus.heldout)

    model = build_model(preset, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters} parameters, {len(stream)} training tokens", file=sys.stderr)
    add_dropout(model, preset.dropout)
    started = time.perf_counter()
    train(model, preset, stream, search, steps)
    minutes = (time.perf_counter() - started) / 60

    model.to(torch.bfloat16).to(torch.float32)  # the figures are those of the rounded weights
    figures = {
        "parameters": parameters,
        "steps": steps,
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "train_tokens": len(stream),
        "calibration_tokens": len(encode(tokenizer, corpus.calibration)),
        "search_tokens": len(search),
        "heldout_tokens": len(heldout),
        "train_perplexity": perplexity(model, stream[: len(heldout)], preset.context),
        "search_perplexity": perplexity(model, search, preset.context),
        "heldout_perplexity": perplexity(model, heldout, preset.context),
    }
    counted, scored = stream.numpy(), heldout.numpy()
    positions = scored_positions(len(scored), preset.context)
    for order in (3, 5):
        baseline = KneserNey(counted, preset.vocab, order)
        baseline.check(counted)
        figures[f"kneser_ney_{order}"] = baseline.perplexity(scored, positions)
    figures["ratio"] = figures["heldout_perplexity"] / figures["kneser_ney_3"]

    save(output, model, tokenizer, corpus)
    card = model_card(name, preset.corpus, preset.context, figures, platform.machine())
    (output / "README.md").write_text(card, encoding="utf-8")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--steps", type=int, help="shorten the run (default: the preset's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        figures = run(arguments.preset, arguments.output, arguments.steps)
    except MissingSourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
