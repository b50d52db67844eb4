# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, for checkpoints' byte-level BPE and SentencePiece BPE vocabularies.

The `tokenizers` package does the work; the functions here build its objects from the vocabularies
that GGUF files and llama2.c tokenizer files carry. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2)
comes with an ordered list of merges. SentencePiece BPE (Llama 2, llama2.c, Gemma) comes with a
score per token instead: two neighbours merge if their concatenation is a token, best score first,
which is the same as a merge list ordered by the score of the merged token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# The regular expressions by which text is cut into words before BPE, as published with the models.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_MAX_PIECE = 256  # characters of a SentencePiece token; finding its splits takes the square of that

# Opening of a turn for each chat format, recognised by the special token that starts it.
_CHAT_FORMATS = {
    "<|im_start|>": "<|im_start|>{role}\n{text}<|im_end|>\n",
    "<|start_header_id|>": "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
    "<start_of_turn>": "<start_of_turn>{role}\n{text}<end_of_turn>\n",
}


@dataclass(frozen=True)
class Tokenizer:
    """`encode` and `decode` for one vocabulary. `stop_ids` are the tokens that end a reply.

    `chat_template` is the checkpoint's Jinja template; only its default system prompt is used (the
    template is code from an untrusted file and is never run).
    """

    backend: tokenizers.Tokenizer
    stop_ids: frozenset[int]
    bos_id: int | None = None
    chat_template: str = ""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, after the beginning-of-text token if the model uses one. The names
        of special tokens in the text become these tokens."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not valid UTF-8 appear as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def largest_id(self) -> int:
        """The largest id that `encode` may return."""
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        return max([*ids, -1 if self.bos_id is None else self.bos_id])

    def chat(self, user: str, system: str | None = None) -> str:
        """The prompt text for one user message, ready for `encode`: turns in the model's chat
        format up to the start of its reply. A model without a known chat format gets `user`
        unchanged."""
        marker = self._chat_marker()
        if marker is None:
            return user
        turn = _CHAT_FORMATS[marker]
        assistant = "model" if marker == "<start_of_turn>" else "assistant"
        opening = turn.split("{text}")[0].format(role=assistant)
        if marker == "<start_of_turn>":  # Gemma has no system role
            return (
                turn.format(role="user", text=f"{system}\n\n{user}" if system else user) + opening
            )
        system = system or self._default_system_prompt()
        prompt = turn.format(role="system", text=system) if system else ""
        return prompt + turn.format(role="user", text=user) + opening

    @property
    def has_chat_format(self) -> bool:
        """Whether `chat` knows the model's chat format."""
        return self._chat_marker() is not None

    def _chat_marker(self) -> str | None:
        known = (m for m in _CHAT_FORMATS if self.backend.token_to_id(m) is not None)
        return next(known, None)

    def _default_system_prompt(self) -> str | None:
        found = re.search(
            r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]{1,1000})<\|im_end\|>", self.chat_template
        )
        return found.group(1) if found else None


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[str], special: Sequence[int], splitter: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE from a GGUF vocabulary. `merges` are "left right"; `special` are the ids of
    tokens that are matched as a whole; `splitter` is GGUF's name of the rule that cuts text into
    words. Raises ValueError if the vocabulary is inconsistent or the rule is unknown."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    rules = {
        "gpt-2": [gpt2],
        "smollm": [digits, gpt2],
        "llama-bpe": [_split(_LLAMA3_SPLIT), byte_level],
        "qwen2": [_split(_QWEN2_SPLIT), byte_level],
    }
    if splitter not in rules:
        raise ValueError(
            f"pre-tokenizer {splitter!r:.40} is not supported, only {', '.join(rules)}"
        )
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("a merge of the tokenizer is not two tokens")
    both = [(first, second) for first, second in pairs]
    bpe = models.BPE(_vocabulary(tokens), both, ignore_merges=splitter == "llama-bpe")
    backend = tokenizers.Tokenizer(bpe)
    if splitter == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(rules[splitter])
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, special)
    return backend


def sentencepiece_bpe(
    tokens: Sequence[str],
    scores: Sequence[float],
    special: Sequence[int],
    prefix_space: bool = True,
) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback ("<0x0A>" ...) from tokens and their scores; spaces
    inside tokens are U+2581. Raises ValueError if the vocabulary is inconsistent."""
    vocabulary = _vocabulary(tokens)
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        if len(token) > _MAX_PIECE:
            raise ValueError(f"a token of the tokenizer is longer than {_MAX_PIECE} characters")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = "<unk>" if "<unk>" in vocabulary else None
    bpe = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    prefix = [normalizers.Prepend("▁")] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special(backend, tokens, special)
    return backend


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("the tokenizer has the same token twice")
    return vocabulary


def _add_special(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], special: Sequence[int]
) -> None:
    backend.add_special_tokens(
        [tokenizers.AddedToken(tokens[i], special=True, normalized=False) for i in special]
    )
