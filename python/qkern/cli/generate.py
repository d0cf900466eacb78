"""``qkern generate``: text from a prompt, printed as it comes."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    model: Annotated[str, typer.Argument(help="Model folder, .gguf file or hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, or with --chat the user's message.")],
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
) -> None:
    """Generate text from a prompt, streaming to stdout."""
    import torch

    from qkern.pipelines.load import load_with_tokenizer

    loaded, tokenizer = load_with_tokenizer(model, device=device)
    inputs = _encode(tokenizer, prompt, chat).to(loaded.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    loaded.generate(**inputs, **sampling, max_new_tokens=max_tokens, streamer=_stdout_streamer(tokenizer))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    from qkern.errors import InputError

    if not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].numel() == 0:
            raise InputError("the prompt has no tokens: give a --prompt with text in it")
        return inputs
    if not tokenizer.chat_template:
        raise InputError("--chat needs a tokenizer with a chat template: this one has none; drop --chat")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _stdout_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Stdout(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(text, nl=stream_end)

    return Stdout(tokenizer, skip_prompt=True, skip_special_tokens=True)
