# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back.

A `Vocabulary` says how text becomes ids and what a token is as text. Byte-level BPE (GPT-2, Llama
3, Qwen, SmolLM) and whatever a tokenizer.json describes are encoded by the `tokenizers` package,
SentencePiece BPE (Llama 2, Mistral, Gemma, llama2.c) by `speq.model.sentencepiece`. Decoding is
done here, token by token, because the tokenizers package can only decode a whole text: `decode` is
the concatenation of what a `TextStream` gives.
"""

import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from speq.model import chat
from speq.model.chat import Message
from speq.model.sentencepiece import SPACE, SentencePieceBpe

# The regular expressions by which text is cut into words before BPE, as published with the models.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's own rule, "default", applies these in turn, with that of GPT-2 behind the first.
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", r"\p{N}+", r"[0-9][0-9][0-9]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# No vocabulary has nearly as many tokens or merges (Gemma 3: 262,144 and 514,906).
_MAX_TOKENS, _MAX_MERGES = 1 << 21, 1 << 22


class TokenType(IntEnum):
    """What a token of a GGUF vocabulary is; others are as UNUSED."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL)  # matched as a whole, and no text
WHOLE = (*SPECIAL, TokenType.USER_DEFINED)  # matched as a whole


@dataclass(frozen=True)
class Piece:
    """A token as text: a string, or bytes that make characters together with their neighbours.
    `special` tokens are for the model and not part of a text."""

    content: str | bytes
    special: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """`encode` gives the ids of a text, `piece` a token as text (None: no such token). `whole` has
    the ids of tokens that are found in a text wherever their name is.

    `whole_runs`: bytes between two tokens of text are valid UTF-8 together, or each is U+FFFD (as
    SentencePiece's byte tokens are decoded); otherwise each invalid sequence is one. `strip`:
    spaces removed from the start of a decoded text.
    """

    encode: Callable[[str], list[int]]
    piece: Callable[[int], Piece | None]
    whole: Mapping[str, int]
    whole_runs: bool = False
    strip: int = 0


@dataclass(frozen=True)
class Tokenizer:
    """`encode`, `decode` and `chat` for one vocabulary. `stop_ids` are the tokens that end a reply.

    `leading` are the tokens before every text (beginning of text). `chat_template` is the
    checkpoint's Jinja template, which is interpreted and never run; `named` are its variables
    bos_token, eos_token and so on. Ids from `limit` on have no row in the model's embedding.
    """

    vocabulary: Vocabulary
    stop_ids: frozenset[int]
    leading: tuple[int, ...] = ()
    chat_template: str = ""
    named: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, after the beginning-of-text tokens if the model uses any. The names
        of special tokens in the text become these tokens. Raises ValueError for what is no text, or
        needs a token that the model does not have."""
        _check_text(text)
        return self._checked([*self.leading, *self.vocabulary.encode(text)])

    def encode_chat(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of the prompt for one user message, as of `encode_messages`."""
        return self.encode_messages(chat.messages(user, system))

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt for a reply to a conversation. A chat template decides about
        beginning-of-text tokens; without one they are there. Raises ValueError as `encode`."""
        for message in messages:
            _check_text(message.text)
        prompt, complete = self._prompt(messages)
        return self._checked([*(() if complete else self.leading), *self.vocabulary.encode(prompt)])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not valid UTF-8 appear as U+FFFD, ids that the
        vocabulary does not have not at all."""
        stream = TextStream(self, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def chat(self, user: str, system: str | None = None) -> str:
        """The prompt text for one user message: turns in the model's chat format up to the start of
        its reply, as the chat template writes it. A model without a known chat format gets `user`
        unchanged. Warns if there is a template that cannot be followed."""
        return self._prompt(chat.messages(user, system))[0]

    @property
    def has_chat_format(self) -> bool:
        """Whether `chat` knows the model's chat format."""
        return bool(self.chat_template) or chat.known_format(self.vocabulary.whole) is not None

    @property
    def system_refusal(self) -> str | None:
        """Why a system message would not reach the model as one; None if it would."""
        return chat.system_refusal(self.chat_template, self.named, self.vocabulary.whole)

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, bool]:
        return chat.prompt(self.chat_template, self.named, self.vocabulary.whole, messages)

    def _checked(self, ids: list[int]) -> list[int]:
        beyond = next((i for i in ids if self.limit is not None and i >= self.limit), None)
        if beyond is not None:
            piece = self.vocabulary.piece(beyond)
            content = piece.content if piece else ""
            text = content.decode(errors="replace") if isinstance(content, bytes) else content
            name = f"{text!r:.60} (id {beyond})"
            rows = self.limit or 0
            raise ValueError(f"the text needs token {name}, but the model has only 0..{rows - 1}")
        return ids


class TextStream:
    """Text of a growing token sequence, piece by piece; holds back incomplete characters. Together
    with that of `prompt`, which is not given again, it is the text that `decode` makes of all."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Iterable[int] = (), skip_special: bool = True
    ) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._skip_special = skip_special
        self._strip = self._vocabulary.strip
        self._bytes = b""  # of a run that has not ended
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        piece = self._vocabulary.piece(token)
        if piece is None or (piece.special and self._skip_special):
            return ""
        if isinstance(piece.content, str):
            return self._stripped(self._end_of_run() + piece.content)
        if self._vocabulary.whole_runs:
            self._bytes += piece.content
            return ""
        return self._stripped(self._decoder.decode(piece.content))

    def flush(self) -> str:
        """What was held back."""
        return self._stripped(self._end_of_run())

    def _end_of_run(self) -> str:
        run, self._bytes = self._bytes, b""
        try:
            return run.decode() + self._decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            self._strip = self._strip - 1 if text[0] == " " else 0
            text = text.removeprefix(" ") if text[0] == " " else text
        return text


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], splitter: str
) -> Vocabulary:
    """Byte-level BPE from a GGUF vocabulary. `merges` are "left right"; `types` are those of the
    tokens (`TokenType`); `splitter` is GGUF's name of the rule that cuts text into words. Of equal
    tokens the last is the one that text becomes. Raises ValueError if the vocabulary is
    inconsistent or the rule is unknown."""
    _check_counts(tokens, merges)
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("a merge of the tokenizer is not two tokens")
    both = [(first, second) for first, second in pairs]
    normalizer, words, ignore_merges = _splitter(splitter)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with library_errors():
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, both, ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    whole = _whole_tokens(tokens, types)
    for special in (True, False):
        added = [
            tokenizers.AddedToken(token, special=special, normalized=False)
            for token, i in whole.items()
            if (types[i] in SPECIAL) == special
        ]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    alphabet = byte_alphabet()

    def content(token: str, kind: int) -> str | bytes:
        return byte_level_bytes(token, alphabet) if kind == TokenType.NORMAL else token.encode()

    return Vocabulary(_encoder(backend), _typed_pieces(tokens, types, content), whole)


def sentencepiece_bpe(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    prefix_space: bool = True,
    strips_right: frozenset[str] = frozenset(),
    parse_special: bool = True,
) -> Vocabulary:
    """SentencePiece BPE with byte fallback ("<0x0A>" ...) from tokens, their scores and their types
    (`TokenType`); spaces inside tokens are U+2581. White space behind the whole tokens of
    `strips_right` is dropped; without `parse_special` there are none. Raises ValueError if the
    vocabulary is inconsistent."""
    _check_counts(tokens)

    def content(token: str, kind: int) -> str | bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if kind == TokenType.NORMAL else None
        return bytes.fromhex(byte[1]) if byte else text(token, kind)

    def text(token: str, kind: int) -> str:
        # What the user defined may have its spaces in either spelling.
        return token if kind in SPECIAL else token.replace(SPACE, " ")

    found = _whole_tokens(tokens, types)
    whole = {text(token, types[i]): i for token, i in found.items()} if parse_special else {}
    return Vocabulary(
        SentencePieceBpe(tokens, scores, whole, prefix_space, strips_right),
        _typed_pieces(tokens, types, content),
        whole,
        whole_runs=True,
        strip=1 if prefix_space else 0,
    )


def from_backend(backend: tokenizers.Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer.json. Raises ValueError, naming it, if its decoder is not one
    of byte-level BPE or of SentencePiece with byte fallback."""
    byte_level, strip = _decoder(backend)
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    alphabet = byte_alphabet()
    cache: dict[int, Piece | None] = {}

    def content(name: str) -> str | bytes:
        if byte_level:
            return byte_level_bytes(name, alphabet)
        name = name.replace(SPACE, " ")
        byte = _BYTE_TOKEN.fullmatch(name)
        return bytes.fromhex(byte[1]) if byte else name

    def piece(token: int) -> Piece | None:
        if token not in cache:
            name = backend.id_to_token(token) if 0 <= token < 1 << 32 else None
            cache[token] = None if name is None else Piece(content(name), token in special)
        return cache[token]

    whole = {token.content: i for i, token in added.items()}
    return Vocabulary(_encoder(backend), piece, whole, whole_runs=not byte_level, strip=strip)


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's table): printable
    bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def byte_level_bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    """The bytes of a byte-level token; one with other characters is text (as tokenizers does)."""
    found = [alphabet.get(character) for character in token]
    known = bytes(byte for byte in found if byte is not None)
    return known if len(known) == len(found) else token.encode()


def _splitter(
    name: str,
) -> tuple[normalizers.Normalizer | None, list[pre_tokenizers.PreTokenizer], bool]:
    """Normalisation, the cutting into words, and whether a word that is a token is not merged, by
    GGUF's name of the rule. Raises ValueError if it is unknown."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    llama3 = [_split(_LLAMA3_SPLIT), byte_level]
    punctuation, *numbers = map(_split, _DEFAULT_SPLITS)
    rules = {
        "default": (None, [punctuation, _split(_GPT2_SPLIT), *numbers, byte_level], False),
        "gpt-2": (None, [gpt2], False),
        "smollm": (None, [digits, gpt2], False),
        "refact": (None, [digits, gpt2], False),
        "starcoder": (None, [digits, gpt2], False),
        "qwen2": (normalizers.NFC(), [_split(_QWEN2_SPLIT), byte_level], False),
        "smaug-bpe": (None, llama3, False),
        "dbrx": (None, llama3, False),
        "tekken": (None, [_split(_TEKKEN_SPLIT), byte_level], True),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (None, llama3, True)),
    }
    if name not in rules:
        raise ValueError(f"pre-tokenizer {name!r:.40} is not supported, only {', '.join(rules)}")
    return rules[name]


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def _encoder(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        try:
            with library_errors():
                return backend.encode(text, add_special_tokens=False).ids
        except ValueError as error:
            raise ValueError(f"the tokenizer fails on the text: {error}") from error

    return encode


def _whole_tokens(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    if len(types) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens have {len(types)} types")
    return {token: i for i, token in enumerate(tokens) if types[i] in WHOLE and token}


def _typed_pieces(
    tokens: Sequence[str], types: Sequence[int], content: Callable[[str, int], str | bytes]
) -> Callable[[int], Piece | None]:
    """How the tokens of a GGUF vocabulary are shown, as by llama.cpp: unused ones not at all."""

    def piece(token: int) -> Piece | None:
        if not 0 <= token < len(tokens):
            return None
        name, kind = tokens[token], types[token]
        if kind == TokenType.BYTE:
            byte = _BYTE_TOKEN.fullmatch(name)
            return Piece(bytes.fromhex(byte[1])) if byte else None
        if kind in (TokenType.NORMAL, *WHOLE):
            return Piece(content(name, kind), kind in SPECIAL)
        return None

    return piece


def _decoder(backend: tokenizers.Tokenizer) -> tuple[bool, int]:
    """Whether the tokens of a tokenizer.json are byte-level, and the spaces to strip."""
    stored: dict[str, Any] = {"type": None}
    if backend.decoder is not None:
        stored = json.loads(backend.decoder.__getstate__())
    parts = stored["decoders"] if stored["type"] == "Sequence" else [stored]
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return True, 0
    expected: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = 0
    if len(parts) == 4:
        strip = parts[3].get("start", 0)
        expected.append({"type": "Strip", "content": " ", "start": strip, "stop": 0})
    if parts != expected:
        raise ValueError(
            f"decoder {' '.join(str(part['type']) for part in parts):.80} is not supported, only "
            "ByteLevel and SentencePiece's Replace, ByteFallback, Fuse and Strip"
        )
    return False, strip


@contextmanager
def library_errors() -> Iterator[None]:
    """Raises ValueError where the tokenizers package fails: it raises bare Exceptions, and the
    panics of its Rust code are no Exceptions and print a report, which is dropped."""
    try:
        with _without_stderr():
            yield
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the package does not export it
            raise
        raise ValueError(f"the tokenizers package cannot cope with it: {error}") from error


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what is written to the process's standard error."""
    if sys.stderr is None:  # closed, and another file may have its number
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_text(text: str) -> None:
    """Raises ValueError for half a character, which is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is no UTF-8: {text[error.start]!a} at position {error.start}"
        ) from error


def _check_counts(tokens: Sequence[str], merges: Sequence[str] = ()) -> None:
    """Raises ValueError for more tokens or merges than any tokenizer has."""
    for name, found, limit in (
        ("tokens", len(tokens), _MAX_TOKENS),
        ("merges", len(merges), _MAX_MERGES),
    ):
        if found > limit:
            raise ValueError(f"the tokenizer has {found} {name}, more than {limit}")
