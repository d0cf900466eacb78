"""A tokenizer as GGUF metadata: byte-level BPE, SentencePiece BPE and WordPiece.

llama.cpp does not read a pre-tokenizer's regular expression from the file; it knows expressions by name. The
name is found by comparing the tokenizer's own expression with those that are known, and one that is
not known is refused: a file with the wrong one would split text in another way than the model was trained on.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from qkern.calibration import load_tokenizer
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.gguf.sentencepiece import Pieces, TokenType, read_sentencepiece

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["PRE_TOKENIZERS", "add_tokenizer", "name_of_model"]

_PHI3: Final = re.compile("(phi)-?3", re.IGNORECASE)
_PHI3_TOKENS: Final = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD: Final = r"[^\r\n\p{L}\p{N}]?"
# Every split that a byte-level tokenizer does before its merges, and llama.cpp's name for it.
PRE_TOKENIZERS: Final[dict[tuple[str, ...], str]] = {
    (_GPT2,): "gpt-2",
    (_CONTRACTIONS + _WORDS + r"\p{N}" + _REST,): "qwen2",
    (_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (
        f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
    ("digits", _GPT2): "smollm",
}


def add_tokenizer(writer: Any, folder: Path, vocab_size: int, *, pre_tokenizer: str | None = None) -> None:
    """Write the tokenizer of a model folder into a file's metadata.

    Parameters
    ----------
    writer : gguf.GGUFWriter
        Takes the keys.
    folder : Path
        With ``tokenizer.json``, or ``tokenizer.model``, or what transformers can make a fast tokenizer of.
    vocab_size : int
        Rows of the embedding; ids without a token become unused ones.
    pre_tokenizer : str, optional
        llama.cpp's name of the pre-tokenizer, for one that is not recognized.

    Raises
    ------
    FormatError
        If the folder has no tokenizer that can be read, or one with more tokens than the embedding.
    UnsupportedError
        If llama.cpp has no such tokenizer.
    """
    if (folder / "tokenizer.model").is_file() and not _is_byte_level(folder):
        _add_sentencepiece_file(writer, folder, vocab_size)
        return
    tokenizer = _load(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] not in ("BPE", "WordPiece"):
        raise UnsupportedError(
            f"a {model['type']} tokenizer is not exported to GGUF: allowed are BPE and WordPiece"
        )
    if model["type"] == "WordPiece":
        _add_word_pieces(writer, content, vocab_size)
        _add_word_specials(writer, tokenizer)
        return
    if model.get("byte_fallback"):
        pieces = _pieces_of_merges(content)
        _add_pieces(writer, pieces, vocab_size)
    else:
        pre = pre_tokenizer or _pre_tokenizer(content)
        _add_byte_level(writer, content, vocab_size, pre)
    first_ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and first_ids[:1] == [bos])
    writer.add_add_eos_token(eos is not None and first_ids[-1:] == [eos])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    _add_template(writer, tokenizer.chat_template)


def _add_template(writer: Any, template: Any) -> None:
    """Write the chat template; of several the one that is used by default."""
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        writer.add_chat_template(template)


def name_of_model(name: str, folder: Path) -> str:
    """Return the name that a file gives the model, which llama.cpp takes for a fact about its tokenizer.

    In a model that is called phi3 llama.cpp drops the white space after special tokens, as Phi-3's tokenizer
    does, and it demands certain tokens. The name is made to say so if, and only if, it is true.
    """
    added = _json(folder / "tokenizer.json").get("added_tokens")
    if added is None:
        added = _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).values()
    strips = any(token.get("special") and token.get("rstrip") for token in added)
    strips = strips and {token.get("content") for token in added} >= _PHI3_TOKENS
    if strips:
        return name if _PHI3.search(name) else f"{name} (phi3)"
    return _PHI3.sub(lambda match: f"{match[1]} 3", name)


def _is_byte_level(folder: Path) -> bool:
    """Whether ``tokenizer.json`` holds a byte-level BPE, which then decides over ``tokenizer.model``."""
    model = _json(folder / "tokenizer.json").get("model", {})
    return model.get("type") == "BPE" and not model.get("byte_fallback")


def _load(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{folder}: the tokenizer has no tokenizer.json form; save a fast one beside it"
        )
    return tokenizer


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    splits = (*_rewrites(content.get("normalizer") or {}), *_splits(content.get("pre_tokenizer") or {}))
    name = PRE_TOKENIZERS.get(splits)
    if name is None:
        raise UnsupportedError(
            f"the pre-tokenizer is not one that llama.cpp is known to have: got {splits}, known are "
            f"{', '.join(PRE_TOKENIZERS.values())}; if you know its name in llama.cpp, pass --pre-tokenizer"
        )
    return name


def _rewrites(normalizer: Mapping[str, Any]) -> list[str]:
    """Name the steps that change text before it is split; llama.cpp has none for a byte-level tokenizer."""
    kind = normalizer.get("type")
    if kind == "Sequence":
        return [rewrite for part in normalizer["normalizers"] for rewrite in _rewrites(part)]
    # NFC changes only text that is not composed, which hardly occurs; Qwen's tokenizers have it.
    return [] if kind in (None, "NFC") else [f"normalizer {kind}"]


def _splits(pre_tokenizer: Mapping[str, Any]) -> list[str]:
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [split for part in pre_tokenizer["pretokenizers"] for split in _splits(part)]
    if kind == "ByteLevel":
        space = ["a space before the text"] if pre_tokenizer.get("add_prefix_space") else []
        return [*space, *([_GPT2] if pre_tokenizer.get("use_regex", True) else [])]
    if kind == "Split":
        pattern = pre_tokenizer["pattern"]
        return [pattern.get("Regex") or f"literal {pattern.get('String')!r}"]
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ["digits"]
    return [] if kind is None else [str(kind)]


def _added(content: Mapping[str, Any]) -> dict[int, tuple[str, TokenType]]:
    return {
        token["id"]: (token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        for token in content.get("added_tokens", ())
    }


def _fill(tokens: dict[int, tuple[str, TokenType]], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids without a token become unused ones."""
    if tokens and max(tokens) >= vocab_size:
        raise FormatError(
            f"the tokenizer has ids up to {max(tokens)}, but the embedding has {vocab_size} rows; "
            "tokenizer and model do not belong together"
        )
    filled = [tokens.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(vocab_size)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def _add_byte_level(writer: Any, content: Mapping[str, Any], vocab_size: int, pre: str) -> None:
    tokens = {number: (text, TokenType.NORMAL) for text, number in content["model"]["vocab"].items()}
    tokens.update(_added(content))
    texts, kinds = _fill(tokens, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in _merges(content)])


def _merges(content: Mapping[str, Any]) -> list[list[str]]:
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in content["model"]["merges"]]


def _pieces_of_merges(content: Mapping[str, Any]) -> Pieces:
    """SentencePiece pieces of a BPE with byte fallback: an earlier merge has a higher score."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(_merges(content)):
        scores.setdefault("".join(pair), -float(rank))
    tokens = {}
    for text, number in content["model"]["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[number] = (text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    unknown = content["model"].get("unk_token")
    tokens.update(_added(content))
    for number, (text, _) in tokens.items():
        if text == unknown:
            tokens[number] = (text, TokenType.UNKNOWN)
    # A piece that no merge makes is found by no merge; its score is never compared.
    floor = -float(len(scores))
    return Pieces(
        tokens=tokens,
        scores={number: scores.get(text, floor) for number, (text, _) in tokens.items()},
        adds_space_prefix=_adds_space(content),
    )


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a step of the tokenizer puts a space before the text."""
    steps: list[Mapping[str, Any]] = []
    for step in (content.get("normalizer"), content.get("pre_tokenizer")):
        if step is not None:
            steps += step.get("normalizers") or step.get("pretokenizers") or [step]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _add_pieces(writer: Any, pieces: Pieces, vocab_size: int) -> None:
    tokens = {
        # llama.cpp looks for added tokens before it marks spaces, and for pieces after it.
        number: (text.replace("\u2581", " ") if kind is TokenType.USER_DEFINED else text, kind)
        for number, (text, kind) in pieces.tokens.items()
    }
    texts, kinds = _fill(tokens, vocab_size)
    floor = min(pieces.scores.values(), default=0.0) - 1
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores([pieces.scores.get(number, floor) for number in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(pieces.adds_space_prefix)


def _add_word_pieces(writer: Any, content: Mapping[str, Any], vocab_size: int) -> None:
    """Write a WordPiece vocabulary; llama.cpp marks the beginning of a word where BERT marks what goes on."""
    model, normalizer = content["model"], content.get("normalizer") or {}
    steps = (normalizer.get("type"), (content.get("pre_tokenizer") or {}).get("type"))
    if steps != ("BertNormalizer", "BertPreTokenizer") or model.get("continuing_subword_prefix") != "##":
        raise UnsupportedError(
            f"the WordPiece tokenizer is not BERT's: got normalizer and pre-tokenizer {steps} and the prefix "
            f"{model.get('continuing_subword_prefix')!r}; allowed are ('BertNormalizer', 'BertPreTokenizer') "
            "and '##'"
        )
    off = [key for key in ("clean_text", "handle_chinese_chars") if not normalizer.get(key, True)]
    if off:
        raise UnsupportedError(f"llama.cpp's WordPiece always has {', '.join(off)}; the tokenizer has not")
    added = _added(content)
    tokens = {}
    for text, number in model["vocab"].items():
        piece = text.removeprefix("##") if text.startswith("##") else f"\u2581{text}"
        tokens[number] = (piece, TokenType.NORMAL)
    texts, kinds = _fill({**tokens, **added}, vocab_size)
    lowercase, strips = bool(normalizer.get("lowercase")), normalizer.get("strip_accents")
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", lowercase if strips is None else bool(strips))


def _add_word_specials(writer: Any, tokenizer: Any) -> None:
    """Write the special tokens of an encoder: llama.cpp begins a text with BOS and ends it with SEP."""
    first, *_, last = tokenizer("a")["input_ids"]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    writer.add_add_bos_token(cls is not None and first == cls)
    writer.add_add_sep_token(sep is not None and last == sep)
    writer.add_add_eos_token(False)
    ids = {"bos": cls, "eos": sep, "sep": sep, "mask": tokenizer.mask_token_id}
    for kind, number in {**ids, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)


def _add_sentencepiece_file(writer: Any, folder: Path, vocab_size: int) -> None:
    pieces = read_sentencepiece(folder / "tokenizer.model")
    settings = _json(folder / "tokenizer_config.json")
    for number, token in settings.get("added_tokens_decoder", {}).items():
        known = pieces.tokens.get(int(number))
        # The marks of Gemma's turns are user-defined in the file and special in the settings, which hold.
        if known is None or known[1] in (TokenType.NORMAL, TokenType.USER_DEFINED):
            role = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
            pieces.tokens[int(number)] = (token["content"], role)
    _add_pieces(writer, pieces, vocab_size)
    ids = {text: number for number, (text, _) in pieces.tokens.items()}
    for kind, default in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", None)):
        token = settings.get(f"{kind}_token", default)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and text not in ids:
            raise InputError(f"{folder}: the {kind} token {text!r} is not among the tokens")
        if text is not None:
            getattr(writer, f"add_{kind}_token_id")(ids[text])
    writer.add_add_bos_token(bool(settings.get("add_bos_token", True)))
    writer.add_add_eos_token(bool(settings.get("add_eos_token", False)))
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    _add_template(writer, chat)


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise FormatError(f"{file} must hold a JSON object: got {type(content).__name__}")
    return content
