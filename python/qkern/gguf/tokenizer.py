"""A tokenizer as GGUF metadata: byte-level BPE, SentencePiece BPE and WordPiece.

llama.cpp does not read a pre-tokenizer's regular expression from the file; it knows expressions by name. The
name is found by comparing the tokenizer's own expression with those that are known, and one that is
not known is refused: a file with the wrong one would split text in another way than the model was trained on.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qkern.calibration import load_tokenizer
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.gguf.json_files import reading
from qkern.gguf.sentencepiece import Pieces, TokenType, read_sentencepiece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = ["KNOWN_NAMES", "PRE_TOKENIZERS", "PreTokenizer", "add_tokenizer", "name_of_model"]

logger = logging.getLogger(__name__)

_PHI3: Final = re.compile("(phi)-?3", re.IGNORECASE)
_PHI3_TOKENS: Final = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_NAMED: Final = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_ROLES: Final = ("bos", "eos", "unk", "pad")
_CONTRACTION: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_BY_THREE: Final = f"{_CONTRACTION}|{_WORDS}" r"\p{N}{1,3}" + _REST


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """What llama.cpp does under a name with the text of a byte-level tokenizer.

    Parameters
    ----------
    name : str
        The name.
    splits : tuple of str
        Regular expressions by which text is cut before merges, one after the other; ``"digits"`` cuts digits
        from each other.
    words_first : bool
        A whole word that is a token is taken before any merge.
    adds_bos : bool
        A text begins with BOS where the file does not say.
    also : tuple of str
        Other names of the same.
    """

    name: str
    splits: tuple[str, ...]
    words_first: bool = False
    adds_bos: bool = False
    also: tuple[str, ...] = ()


PRE_TOKENIZERS: Final = (
    PreTokenizer(
        name="gpt-2",
        splits=(_GPT2,),
        also=("phi-2", "mpt", "olmo", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"),
    ),
    PreTokenizer(
        name="qwen2",
        splits=(f"{_CONTRACTION}|{_WORDS}" r"\p{N}" + _REST,),
        also=("stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "hunyuan"),
    ),
    PreTokenizer(
        name="llama-bpe",
        splits=(_BY_THREE,),
        words_first=True,
        adds_bos=True,
        also=(
            *("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
    ),
    PreTokenizer(name="dbrx", splits=(_BY_THREE,), also=("smaug-bpe",)),
    PreTokenizer(
        name="tekken",
        splits=(f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|" r"\p{N}" + _REST_WITH_SLASH,),
        words_first=True,
        adds_bos=True,
    ),
    PreTokenizer(
        name="gpt-4o",
        splits=(
            f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?|"
            r"\p{N}{1,3}" + _REST_WITH_SLASH,
        ),
        also=("llama4", "kanana2"),
    ),
    PreTokenizer(
        name="smollm",
        splits=("digits", _GPT2),
        also=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
)


# Names that a file may have, llama.cpp's other ones for the same too.
KNOWN_NAMES: Final = {name: known for known in PRE_TOKENIZERS for name in (known.name, *known.also)}


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
        llama.cpp's name of the pre-tokenizer, for one that is not recognized. A warning says so if the name
        is not known here, or stands for one that cuts text otherwise than the tokenizer does.

    Raises
    ------
    FormatError
        If the folder has no tokenizer that can be read, or one whose vocabulary, leaving aside tokens that
        were added to it, is larger than the embedding.
    UnsupportedError
        If llama.cpp has no such tokenizer.
    """
    if (folder / "tokenizer.model").is_file() and not _is_byte_level(folder):
        _add_sentencepiece_file(writer, folder, vocab_size)
        return
    tokenizer = _load(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    every = {token["id"]: _Added.of(token) for token in content.get("added_tokens", ())}
    added = _with_rows(folder, every, vocab_size)
    numbers = {role: getattr(tokenizer, f"{role}_token_id") for role in (*_ROLES, "cls", "sep", "mask")}
    ids = {role: number for role, number in numbers.items() if number is not None and number < vocab_size}
    model = content["model"]
    if model["type"] not in ("BPE", "WordPiece"):
        raise UnsupportedError(
            f"a {model['type']} tokenizer is not exported to GGUF: allowed are BPE and WordPiece"
        )
    without = every.keys() - added.keys()  # of some kinds transformers puts added tokens into the vocabulary
    model["vocab"] = {text: number for text, number in model["vocab"].items() if number not in without}
    if model["type"] == "WordPiece":
        _add_word_pieces(writer, content, added, vocab_size)
        _add_word_specials(writer, tokenizer("a")["input_ids"], ids)
        return
    if model.get("byte_fallback"):
        pieces = _pieces_of_merges(content, added)
        _add_pieces(writer, pieces, vocab_size)
    else:
        _add_byte_level(writer, content, added, vocab_size, _pre_tokenizer(content, pre_tokenizer))
    _add_ids(writer, {role: ids[role] for role in _ROLES if role in ids})
    _add_ends(writer, tokenizer("a")["input_ids"], ids)
    _add_template(writer, tokenizer.chat_template)


def _add_ids(writer: Any, ids: Mapping[str, int]) -> None:
    for role, number in ids.items():
        getattr(writer, f"add_{role}_token_id")(number)


def _add_ends(writer: Any, found: list[int], ids: Mapping[str, int]) -> None:
    """Write whether texts begin with BOS and end with EOS, as one that the tokenizer read does."""
    writer.add_add_bos_token("bos" in ids and found[:1] == [ids["bos"]])
    writer.add_add_eos_token("eos" in ids and found[-1:] == [ids["eos"]])


def _add_template(writer: Any, template: Any) -> None:
    """Write the chat template; of several the one that is used by default."""
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        writer.add_chat_template(template)


def name_of_model(name: str, folder: Path, vocab_size: int) -> str:
    """Return the name that a file gives the model, which llama.cpp takes for a fact about its tokenizer.

    In a model that is called phi3 llama.cpp drops the white space after special tokens, as Phi-3's tokenizer
    does, and it demands certain tokens. The name is made to say so if, and only if, it is true.
    """
    added = [token for number, token in _added_beside(folder).items() if number < vocab_size]
    strips = any(token.is_special and token.strips_right for token in added)
    strips = strips and {token.text for token in added} >= _PHI3_TOKENS
    if strips:
        return name if _PHI3.search(name) else f"{name} (phi3)"
    return _PHI3.sub(lambda match: f"{match[1]} 3", name)


def _is_byte_level(folder: Path) -> bool:
    """Whether ``tokenizer.json`` holds a byte-level BPE, which then decides over ``tokenizer.model``."""
    with reading(folder / "tokenizer.json") as content:
        model = content.get("model", {})
        return bool(model.get("type") == "BPE" and not model.get("byte_fallback"))


def _load(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{folder}: the tokenizer has no tokenizer.json form; save a fast one beside it"
        )
    return tokenizer


def _read_by(file: Path, text: str) -> list[int]:
    """Ids that a ``tokenizer.json`` makes of a text."""
    from tokenizers import Tokenizer

    try:
        return list(Tokenizer.from_file(str(file)).encode(text).ids)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise FormatError(f"{file} is no tokenizer ({error}); fetch it again") from error


def _pre_tokenizer(content: Mapping[str, Any], named: str | None) -> str:
    """Find llama.cpp's name of the pre-tokenizer; one that is given is taken, with a warning if in doubt."""
    splits = (*_rewrites(content.get("normalizer") or {}), *_splits(content.get("pre_tokenizer") or {}))
    words_first = bool(content["model"].get("ignore_merges"))
    alike = [known for known in PRE_TOKENIZERS if known.splits == splits]
    fitting = [known for known in alike if known.words_first == words_first]
    if len(fitting) < len(alike) and (named or not fitting) and _merges_make_all_words(content):
        fitting = alike  # then nothing depends on what is taken first
    got = f"{splits}{f', ignore_merges {words_first}' if alike else ''}"
    if named is None:
        if fitting:
            return fitting[0].name
        names = ", ".join(known.name for known in PRE_TOKENIZERS)
        raise UnsupportedError(
            f"the pre-tokenizer is not one that llama.cpp is known to have: got {got}, known are "
            f"{names}; if you know its name in llama.cpp, pass --pre-tokenizer"
        )
    if named not in KNOWN_NAMES:
        logger.warning(
            "the pre-tokenizer %r is not known: known are %s; llama.cpp loads the file only if it has one of "
            "that name",
            named,
            ", ".join(KNOWN_NAMES),
        )
    elif KNOWN_NAMES[named] not in fitting:
        its = KNOWN_NAMES[named]
        logger.warning(
            "llama.cpp's pre-tokenizer %r is not the tokenizer's own, text may get other tokens: it has %s, "
            "ignore_merges %s; the tokenizer has %s, ignore_merges %s",
            *(named, its.splits, its.words_first, splits, words_first),
        )
    return named


def _merges_make_all_words(content: Mapping[str, Any]) -> bool:
    from tokenizers import models

    words = content["model"]["vocab"]
    merges = models.BPE(words, [(left, right) for left, right in _merges(content)])
    added = {token["content"] for token in content.get("added_tokens", ())}
    return all(len(merges.tokenize(word)) == 1 for word in words if word not in added)


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
        pattern, behavior = pre_tokenizer["pattern"], pre_tokenizer["behavior"]
        split = pattern.get("Regex") or f"literal {pattern.get('String')!r}"
        # The known expressions match all of a text: what they do not match may as well be removed.
        keeps = behavior == "Isolated" or (behavior == "Removed" and pre_tokenizer.get("invert"))
        return [split if keeps else f"{behavior} {split}"]
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ["digits"]
    return [] if kind is None else [str(kind)]


def _with_rows(folder: Path, added: Mapping[int, _Added], vocab_size: int) -> dict[int, _Added]:
    """Leave out added tokens without a row: folders are about with one for padding that no model had."""
    without = sorted(token.text for number, token in added.items() if number >= vocab_size)
    if without:
        logger.warning("%s: %s have no row in the embedding and are left out", folder, ", ".join(without))
    return {number: token for number, token in added.items() if number < vocab_size}


def _typed(added: Mapping[int, _Added]) -> dict[int, tuple[str, TokenType]]:
    return {
        number: (token.text, TokenType.CONTROL if token.is_special else TokenType.USER_DEFINED)
        for number, token in added.items()
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


def _add_byte_level(
    writer: Any, content: Mapping[str, Any], added: Mapping[int, _Added], vocab_size: int, pre: str
) -> None:
    tokens = {number: (text, TokenType.NORMAL) for text, number in content["model"]["vocab"].items()}
    tokens.update(_typed(added))
    texts, kinds = _fill(tokens, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in _merges(content)])


def _merges(content: Mapping[str, Any]) -> list[list[str]]:
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in content["model"]["merges"]]


def _pieces_of_merges(content: Mapping[str, Any], added: Mapping[int, _Added]) -> Pieces:
    """SentencePiece pieces of a BPE with byte fallback: an earlier merge has a higher score."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(_merges(content)):
        scores.setdefault("".join(pair), -float(rank))
    tokens = {}
    for text, number in content["model"]["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[number] = (text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    unknown = content["model"].get("unk_token")
    tokens.update(_typed(added))
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


def _add_word_pieces(
    writer: Any, content: Mapping[str, Any], added: Mapping[int, _Added], vocab_size: int
) -> None:
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
    tokens = {}
    for text, number in model["vocab"].items():
        piece = text.removeprefix("##") if text.startswith("##") else f"\u2581{text}"
        tokens[number] = (piece, TokenType.NORMAL)
    texts, kinds = _fill(tokens | _typed(added), vocab_size)
    lowercase, strips = bool(normalizer.get("lowercase")), normalizer.get("strip_accents")
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", lowercase if strips is None else bool(strips))


def _add_word_specials(writer: Any, found: list[int], ids: Mapping[str, int]) -> None:
    """Write the special tokens of an encoder: llama.cpp begins a text with BOS and ends it with SEP."""
    writer.add_add_bos_token("cls" in ids and found[0] == ids["cls"])
    writer.add_add_sep_token("sep" in ids and found[-1] == ids["sep"])
    writer.add_add_eos_token(False)
    places = {"bos": "cls", "eos": "sep", "sep": "sep", "mask": "mask", "unk": "unk", "pad": "pad"}
    _add_ids(writer, {place: ids[role] for place, role in places.items() if role in ids})


def _add_sentencepiece_file(writer: Any, folder: Path, vocab_size: int) -> None:
    pieces = read_sentencepiece(folder / "tokenizer.model")
    beside = _added_beside(folder)
    added = _with_rows(folder, beside, vocab_size)
    for number, token in _typed(added).items():
        known = pieces.tokens.get(number)
        # The marks of Gemma's turns are user-defined in the file and special in the settings, which hold.
        if known is None or known[1] in (TokenType.NORMAL, TokenType.USER_DEFINED):
            pieces.tokens[number] = token
    _add_pieces(writer, pieces, vocab_size)
    numbers = {text: number for number, (text, _) in pieces.tokens.items()}
    named = _named_tokens(folder)
    ids = {}
    for role, default in zip(_ROLES, ("<s>", "</s>", "<unk>", None), strict=True):
        text = named.get(f"{role}_token", default)
        if text in numbers:
            ids[role] = numbers[text]
        elif text is not None and text not in {token.text for token in beside.values()}:
            raise InputError(f"{folder}: the {role} token {text!r} is not among the tokens")
    _add_ids(writer, ids)
    fast = folder / "tokenizer.json"
    if fast.is_file():  # transformers 5 goes by it, whatever the settings say
        _add_ends(writer, _read_by(fast, "a"), ids)
    with reading(folder / "tokenizer_config.json") as settings:
        if not fast.is_file():
            writer.add_add_bos_token("bos" in ids and bool(settings.get("add_bos_token", True)))
            writer.add_add_eos_token("eos" in ids and bool(settings.get("add_eos_token", False)))
        template = folder / "chat_template.jinja"
        if not template.is_file():
            _add_template(writer, settings.get("chat_template"))
            return
    try:
        _add_template(writer, template.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{template} is no text ({error}); fetch it again") from None


@dataclass(frozen=True, slots=True)
class _Added:
    """A token that was added to a vocabulary."""

    text: str
    is_special: bool
    strips_right: bool = False

    @classmethod
    def of(cls, token: Mapping[str, Any]) -> _Added:
        return cls(_text(token), bool(token.get("special")), bool(token.get("rstrip")))


def _added_beside(folder: Path) -> dict[int, _Added]:
    """Read the added tokens, by id; where the files that may have them differ the last one counts."""
    special = set(_named_tokens(folder).values())
    files: dict[str, Callable[[dict[str, Any]], Iterable[tuple[Any, _Added]]]] = {
        "added_tokens.json": lambda content: (
            (number, _Added(text, text in special)) for text, number in content.items()
        ),
        "tokenizer.json": lambda content: (
            (token["id"], _Added.of(token)) for token in content.get("added_tokens", ())
        ),
        "tokenizer_config.json": lambda content: (
            (number, _Added.of(token)) for number, token in content.get("added_tokens_decoder", {}).items()
        ),
    }
    added: dict[int, _Added] = {}
    for name, tokens_of in files.items():
        with reading(folder / name) as content:
            added |= {int(number): token for number, token in tokens_of(content)}
    return added


def _named_tokens(folder: Path) -> dict[str, str | None]:
    """Tokens with a part to play, by its name; None where the files say that there is none."""
    named: dict[str, str | None] = {}
    with reading(folder / "tokenizer_config.json") as settings:
        named |= _parts(settings)
        is_old = "added_tokens_decoder" not in settings
    with reading(folder / "special_tokens_map.json") as older:
        return named | _parts(older) if is_old else named


def _parts(content: Mapping[str, Any]) -> dict[str, str | None]:
    parts: dict[str, Any] = {key: content[key] for key in _NAMED if key in content}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = content.get(key) or ()
        more = more.values() if isinstance(more, dict) else more
        parts |= {f"{key} {number}": token for number, token in enumerate(more)}
    return {part: None if token is None else _text(token) for part, token in parts.items()}


def _text(token: Any) -> str:
    text = token if isinstance(token, str) else token["content"]
    if not isinstance(text, str):
        raise TypeError(f"a token is {text!r:.60}")
    return text
