"""Ollama's Modelfile, made of nothing but what lies beside the model.

Ollama's templates are Go's and know turns of system, user and assistant; a chat template is a Jinja
program. The program is run on marked turns, what it puts between them is read off, and the template made of
that is kept only if it writes other conversations as the program does.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qkern.calibration import load_tokenizer
from qkern.errors import FormatError
from qkern.gguf.json_files import reading

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ollama_modelfile"]

logger = logging.getLogger(__name__)

# transformers' names of sampling parameters, and Ollama's.
_SAMPLING: Final = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
# No template writes these by itself.
_SYSTEM, _USER, _REPLY, _AGAIN = (f"qkern{role}turn" for role in ("system", "user", "reply", "again"))


@dataclass(frozen=True, slots=True)
class _Turns:
    """What a chat template writes around the turns.

    Parameters
    ----------
    start : str
        Before the first question, without a system message.
    system : tuple of str or None
        Before the system message, and between it and the first question; None if there can be none.
    reply, question : str
        Between a question and its reply, and between a reply and the next question.
    end : str
        After the last question, where the reply begins.
    """

    start: str
    system: tuple[str, str] | None
    reply: str
    question: str
    end: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """Write a conversation that ends with a question."""
        system = [message["content"] for message in messages if message["role"] == "system"]
        turns = [message["content"] for message in messages if message["role"] != "system"]
        text = self.start
        if system:
            assert self.system is not None
            text = self.system[0] + system[0] + self.system[1]
        for number, turn in enumerate(turns[:-1]):
            text += turn + (self.question if number % 2 else self.reply)
        return text + turns[-1] + self.end

    def go(self) -> str:
        """Ollama's template."""
        opening = self.start
        if self.system is not None:
            before, after = self.system
            opening = (
                f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{self.start}{{{{ end }}}}"
            )
        return (
            f"{opening}{{{{ range $number, $_ := .Messages }}}}"
            "{{ $last := eq (len (slice $.Messages $number)) 1 }}"
            '{{ if eq .Role "user" }}{{ .Content }}'
            f"{{{{ if $last }}}}{self.end}{{{{ else }}}}{self.reply}{{{{ end }}}}"
            '{{ else if eq .Role "assistant" }}{{ .Content }}'
            f"{{{{ if not $last }}}}{self.question}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


def ollama_modelfile(folder: Path, file: str) -> str:
    """Return the Modelfile of a model.

    Parameters
    ----------
    folder : Path
        Of the model: its tokenizer, chat template and ``generation_config.json`` are read.
    file : str
        Name of the GGUF, in the folder of the Modelfile.

    Raises
    ------
    FormatError
        If a file of the folder is damaged, or a token that ends a reply is none of the tokenizer's.
    """
    tokenizer = load_tokenizer(folder)
    lines = [f"FROM ./{file}"]
    template = _template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    with reading(folder / "generation_config.json") as settings:
        stops = settings.get("eos_token_id", tokenizer.eos_token_id)
        stops = [number for number in (stops if isinstance(stops, list) else [stops]) if number is not None]
        texts = [_stop(tokenizer, number, folder) for number in stops]
        lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts]
        # transformers leaves the other parameters alone where it does not sample.
        if settings.get("do_sample"):
            lines += [
                f"PARAMETER {theirs} {settings[ours]}"
                for ours, theirs in _SAMPLING.items()
                if settings.get(ours) is not None
            ]
    return "\n".join(lines) + "\n"


def _stop(tokenizer: Any, number: Any, folder: Path) -> str:
    """Return the text of a token that ends a reply."""
    is_number = isinstance(number, int) and not isinstance(number, bool)
    text = tokenizer.decode([number], clean_up_tokenization_spaces=False) if is_number else ""
    if not text or "\ufffd" in text:
        raise FormatError(
            f"{folder / 'generation_config.json'}: eos_token_id must name tokens of the "
            f"tokenizer that are text: got {number!r:.60}; fetch it again"
        )
    return str(text)


def _template(tokenizer: Any) -> str | None:
    """Ollama's form of the chat template; None, and a warning, if it cannot say what the template does."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    # A template that asks for the date would keep today's.
    turns = None if "strftime_now" in tokenizer.chat_template else _read_turns(tokenizer)
    if turns is None:
        logger.warning(
            "the chat template is not one of plain turns: the Modelfile has no TEMPLATE, and Ollama takes "
            "the one it knows that is most like the template in the file"
        )
        return None
    return turns.go()


def _read_turns(tokenizer: Any) -> _Turns | None:
    roles = ("user", "assistant", "user")
    talk = [
        {"role": role, "content": text} for role, text in zip(roles, (_USER, _REPLY, _AGAIN), strict=True)
    ]
    system = {"role": "system", "content": _SYSTEM}
    plain = _rendered(tokenizer, talk)
    between = re.fullmatch(f"(.*){_USER}(.*){_REPLY}(.*){_AGAIN}(.*)", plain or "", re.DOTALL)
    if between is None or plain is None:
        return None
    start, reply, question, end = between.groups()
    with_system = _rendered(tokenizer, [system, *talk])
    if re.search(r'\{\{|"""', f"{plain}{with_system}"):  # would end or begin something in a Modelfile
        return None
    head = re.match(f"(.*){_SYSTEM}(.*){_USER}", with_system or "", re.DOTALL)
    turns = _Turns(start, None if head is None else (head[1], head[2]), reply, question, end)
    longer = [*talk, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
    trials = [talk[:1], talk, longer]
    if turns.system is not None:
        trials += [[system, *trial] for trial in trials]
    return turns if all(_rendered(tokenizer, trial) == turns.render(trial) for trial in trials) else None


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """Text of a conversation, without the BOS that the tokenizer adds; None if the template refuses it."""
    from jinja2 import TemplateError

    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError):
        return None
    bos = tokenizer.bos_token
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text
