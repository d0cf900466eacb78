"""The tokenizer in a GGUF's metadata, as a fast tokenizer of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qkern.errors import FormatError, UnsupportedError
from qkern.gguf.cursor import MetadataArray
from qkern.gguf.reader import GGUFFile
from qkern.gguf.sentencepiece import TokenType
from qkern.gguf.tokenizer import KNOWN_NAMES, PreTokenizer

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_tokenizer"]

# What llama.cpp takes where a file of the kind does not say, or names a token that it has not.
_ROLES: Final = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}}
_SPACE: Final = "\u2581"
# Longer ones are no pieces of text; splitting them everywhere would take quadratic time.
_LONGEST_PIECE: Final = 512


def read_tokenizer(path: str | Path) -> Any:
    """Build the tokenizer that a file describes.

    Parameters
    ----------
    path : str or Path
        The file, or a part of a split one.

    Returns
    -------
    PreTrainedTokenizerFast
        With the file's special tokens and chat template.

    Raises
    ------
    UnsupportedError
        If its kind or its pre-tokenizer is not known.
    FormatError
        If the file is damaged or has no tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    with GGUFFile(path) as file:
        kind = file.metadata.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise UnsupportedError(
                f"{file.path}: tokenizers read from a GGUF are gpt2 (byte-level BPE) and llama "
                f"(SentencePiece BPE): got {kind!r:.60}; use the original model's tokenizer"
            )
        content = _Content(file)
        try:
            if kind == "gpt2":
                known = _pre_tokenizer(file)
                backend, adds_bos = _byte_level(content, known), known.adds_bos
            else:
                backend, adds_bos = _sentencepiece(content), True
            content.finish(backend, adds_bos=adds_bos)
            chat = file.metadata.get("tokenizer.chat_template")
            return PreTrainedTokenizerFast(
                tokenizer_object=backend,
                clean_up_tokenization_spaces=False,
                chat_template=chat if isinstance(chat, str) else None,
                **content.roles,
            )
        except (FormatError, UnsupportedError):
            raise
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise FormatError(
                f"{file.path}: its tokenizer cannot be built: {' '.join(str(error).split())}; fetch it again"
            ) from error


class _Content:
    """Tokens of a file, checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.texts = self._array("tokens", str)
        self.kinds = self._array("token_type", int) or [int(TokenType.NORMAL)] * len(self.texts)
        self.vocabulary = {text: number for number, text in enumerate(self.texts)}
        if not self.texts or len(self.kinds) != len(self.texts) or len(self.vocabulary) != len(self.texts):
            raise FormatError(
                f"{file.path}: tokens must be different texts, each with a type: got {len(self.texts)} "
                f"tokens, {len(self.vocabulary)} texts, {len(self.kinds)} types; fetch it again"
            )
        ids = {role: self._id(role) for role in ("bos", "eos", "unk", "pad")}
        self.ids = {role: number for role, number in ids.items() if number is not None}
        # Tokens with a part are special in transformers; a part of text must not become so.
        self.roles = {
            f"{role}_token": self.texts[number]
            for role, number in self.ids.items()
            if self.kinds[number] != TokenType.NORMAL
        }

    def _array(self, key: str, kind: type) -> list[Any]:
        name = f"tokenizer.ggml.{key}"
        found = self.file.metadata.get(name, [])
        items = found[:] if isinstance(found, MetadataArray) else found
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise FormatError(f"{self.file.path}: {name} must be an array of {kind.__name__}; fetch it again")
        return items

    def _id(self, role: str) -> int | None:
        key = {"unk": "unknown", "pad": "padding"}.get(role, role)
        default = _ROLES[self.file.metadata["tokenizer.ggml.model"]].get(role)
        for number in (self.file.metadata.get(f"tokenizer.ggml.{key}_token_id"), default):
            if isinstance(number, int) and 0 <= number < len(self.texts):
                return number
        return None

    def of(self, kind: TokenType) -> list[str]:
        """Texts of the tokens of a kind."""
        return [text for text, its in zip(self.texts, self.kinds, strict=True) if its == kind]

    def merges(self) -> list[tuple[str, str]]:
        """Pairs that are merged, the first ones first."""
        pairs = [text.partition(" ") for text in self._array("merges", str)]
        return [(left, right) for left, _, right in pairs]

    def scores(self) -> list[float]:
        """Score of each token."""
        scores = self._array("scores", float)
        if len(scores) != len(self.texts):
            raise FormatError(f"{self.file.path}: {len(self.texts)} tokens have {len(scores)} scores")
        return scores

    def flag(self, key: str, default: bool) -> bool:
        """Value of a switch."""
        return bool(self.file.metadata.get(f"tokenizer.ggml.{key}", default))

    def finish(self, backend: Any, *, adds_bos: bool) -> None:
        """Give a tokenizer the tokens that are taken whole, and those that begin and end every text."""
        from tokenizers import AddedToken
        from tokenizers.processors import TemplateProcessing

        for kind, is_special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
            added = [AddedToken(text, normalized=False, special=is_special) for text in self.of(kind)]
            (backend.add_special_tokens if is_special else backend.add_tokens)(added)
        ends = [
            role
            for role, default in (("bos", adds_bos), ("eos", False))
            if self.flag(f"add_{role}_token", default) and role in self.ids
        ]
        if ends:
            backend.post_processor = TemplateProcessing(
                single=[part for part in ("bos", "$A", "eos") if part == "$A" or part in ends],
                special_tokens=[
                    {"id": role, "ids": [self.ids[role]], "tokens": [self.texts[self.ids[role]]]}
                    for role in ends
                ],
            )


def _pre_tokenizer(file: GGUFFile) -> PreTokenizer:
    named = file.metadata.get("tokenizer.ggml.pre")
    known = KNOWN_NAMES.get(str(named))
    if known is None:
        raise UnsupportedError(
            f"{file.path}: the pre-tokenizer {named!r:.60} is not known: known are {', '.join(KNOWN_NAMES)}; "
            "use the original model's tokenizer"
        )
    return known


def _byte_level(content: _Content, known: PreTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = content.merges()
    backend = Tokenizer(models.BPE(content.vocabulary, merges, ignore_merges=known.words_first))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if split == "digits"
        else pre_tokenizers.Split(Regex(split), behavior="isolated")
        for split in known.splits
    ]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, whole])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(content: _Content) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = content.of(TokenType.UNKNOWN)
    backend = Tokenizer(
        models.BPE(
            content.vocabulary,
            _merges_of_scores(content),
            unk_token=unknown[0] if unknown else None,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    adds_space = content.flag("add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if adds_space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_of_scores(content: _Content) -> list[tuple[str, str]]:
    """SentencePiece merges two neighbours when their text is a piece, that of the highest score first."""
    normal = {
        text: score
        for text, kind, score in zip(content.texts, content.kinds, content.scores(), strict=True)
        if kind == TokenType.NORMAL and len(text) <= _LONGEST_PIECE
    }
    pieces = sorted(normal, key=normal.__getitem__, reverse=True)
    return [
        (piece[:place], piece[place:])
        for piece in pieces
        for place in range(1, len(piece))
        if piece[:place] in normal and piece[place:] in normal
    ]
