# SPDX-License-Identifier: Apache-2.0
"""Comparing tokenizers with those of others, on varied strings: for `make check-models`.

A comparison is a row: name, strings compared, differences. What is compared are ids, the text that
they become, and the text as it is streamed. `Reference` is what an implementation of others does.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speq.model.loaders.gguf_file import Metadata
from speq.model.loaders.gguf_tokenizer import read_tokenizer as read_gguf_tokenizer
from speq.model.loaders.hf_tokenizer import read_tokenizer as read_hf_tokenizer
from speq.model.tokenizer import TextStream, Tokenizer, TokenType

Row = tuple[str, int, int]

_WORDS = (
    *(
        "the",
        "Hello",
        "world",
        "I'm",
        "we'LL",
        "don't",
        "HTTPServer",
        "snake_case",
        "naïve",
        "Straße",
    ),
    *(
        "Ελληνικά",
        "Привет",
        "мир",
        "世界",
        "日本語テキスト",
        "한국어",
        "नमस्ते",
        "ไทย",
        "שלום",
        "مرحبا",
        "é",
        "e\u0301",
    ),
    *("3.14159", "12345678", "0xFF", "1st", "½", "Ⅷ", "٣٤", "²"),
    *("😀", "👩‍👩‍👧", "🇩🇪", "→", "€", "…", "\ufeff", "\u200b", "\xa0"),
    *(
        "def f(x):",
        "a+=b;",
        "<br/>",
        "$x^2$",
        "http://a.b/c?d=e&f",
        "/*--*/",
        "###",
        "'s",
        "''",
        "“q”",
    ),
)
_GAPS = (
    " ",
    " ",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t",
    " \n ",
    "\r\n",
    "",
    "",
    "▁",
)


def varied_strings(count: int, seed: int, whole: Sequence[str] = ()) -> list[str]:
    """`count` different strings: words of many scripts, numbers, code, white space of every kind,
    random characters, and the tokens `whole`."""
    chance = random.Random(seed)
    found = {"", " ", "  ", "\n", "a", " a", "a ", "\ta\n\nb  a\n"}
    while len(found) < count:
        parts = []
        for _ in range(chance.randint(1, 12)):
            if whole and chance.random() < 0.15:
                parts.append(chance.choice(whole))
            elif chance.random() < 0.15:
                ranges = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x500), (0x4E00, 0x4F00))
                low, high = chance.choice((*ranges, (0x1F600, 0x1F640)))
                parts += [chr(chance.randrange(low, high)) for _ in range(chance.randint(1, 4))]
            else:
                parts.append(chance.choice(_WORDS))
            parts.append(chance.choice(_GAPS))
        found.add("".join(parts))
    return sorted(found)


@dataclass(frozen=True)
class Reference:
    """Another implementation: ids of a text, beginning-of-text tokens included, and the text of ids
    without special tokens; None where only ids are compared."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str] | None = None


def compare(
    name: str, tokenizer: Tokenizer, reference: Reference, strings: Sequence[str]
) -> tuple[Row, list[str]]:
    """The row of a comparison, and a line for each string that differs."""
    lines = []
    for text in strings:
        ids, expected = tokenizer.encode(text), reference.encode(text)
        decoded, streamed = tokenizer.decode(expected), stream(tokenizer, expected)
        if ids != expected:
            lines.append(f"{name}: {text!r} becomes {ids}, not {expected}")
        elif reference.decode and decoded != reference.decode(expected):
            lines.append(f"{name}: {expected} become {decoded!r}, not {reference.decode(ids)!r}")
        elif streamed != decoded:
            lines.append(f"{name}: {expected} are streamed as {streamed!r}, not {decoded!r}")
    return (name, len(strings), len(lines)), lines


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids` as it comes token by token."""
    text = TextStream(tokenizer)
    return "".join([*map(text.push, ids), text.flush()])


# What is compared. The packages are extras of `make check-models`.

_SYMBOLS = ("\n\n", "\n\n\n", "  ", "    ", "\t\t", "<think>", "<tool_call>", "é→")


def rows(folder: Path, seed: int, count: int = 300) -> Iterator[tuple[Row, list[str]]]:
    """All comparisons: a row, and lines that say what differs. `folder` is scratch space."""
    yield from _sentencepiece_rows(folder, seed, count)
    yield from _mistral_rows(folder, seed, count)
    yield from _transformers_rows(folder, seed, count)


def _sentencepiece_rows(folder: Path, seed: int, count: int) -> Iterator[tuple[Row, list[str]]]:
    """A BPE model that `sentencepiece` trains, in a GGUF's metadata. With a space before the text
    it has no user-defined tokens: llama.cpp puts one behind each of them, too."""
    import sentencepiece

    for prefix, symbols in ((False, _SYMBOLS), (True, ())):
        text = folder / "text"
        text.write_text("\n".join(varied_strings(3000, seed + 1)))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(folder / "trained"),
            model_type="bpe",
            vocab_size=1200,
            byte_fallback=True,
            character_coverage=0.98,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(symbols),
            num_threads=1,
            minloglevel=2,
        )
        processor = sentencepiece.SentencePieceProcessor(str(folder / "trained.model"))
        name = f"sentencepiece, trained, {'' if prefix else 'no '}prefix space"
        reference = Reference(
            lambda text, p=processor: [p.bos_id(), *p.encode(text)],
            lambda ids, p=processor: p.decode(ids),
        )
        tokenizer = gguf_tokenizer(processor, symbols, prefix)
        # llama.cpp finds user-defined tokens before spaces become U+2581, sentencepiece afterwards.
        strings = [s for s in varied_strings(2 * count, seed, symbols) if "▁" not in s or prefix]
        yield compare(name, tokenizer, reference, strings[:count])


def gguf_tokenizer(processor: Any, symbols: Sequence[str] = (), prefix: bool = True) -> Tokenizer:
    """The tokenizer that llama.cpp's converter makes of a sentencepiece model."""
    size = processor.vocab_size()
    tokens = [processor.id_to_piece(i) for i in range(size)]
    types = [TokenType.NORMAL] * size
    for i, token in enumerate(tokens):
        if processor.is_unknown(i):
            types[i] = TokenType.UNKNOWN
        elif processor.is_control(i):
            types[i] = TokenType.CONTROL
        elif processor.is_byte(i):
            types[i] = TokenType.BYTE
        elif token.replace("▁", " ") in symbols:
            tokens[i], types[i] = token.replace("▁", " "), TokenType.USER_DEFINED
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array([processor.get_score(i) for i in range(size)]),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
    }
    return read_gguf_tokenizer(Metadata(fields))


def _mistral_rows(folder: Path, seed: int, count: int) -> Iterator[tuple[Row, list[str]]]:
    """The vocabulary of Mistral 7B, as sentencepiece reads it and as transformers saves it."""
    import sentencepiece
    import transformers
    from transformers.tokenization_utils_base import generate_merges

    found = importlib.util.find_spec("mistral_common")  # its data alone is used
    if found is None or found.origin is None:
        raise ModuleNotFoundError("mistral-common is not installed")
    path = Path(found.origin).parent / "data/tokenizer.model.v1"
    processor = sentencepiece.SentencePieceProcessor(str(path))
    strings = varied_strings(count, seed)
    reference = Reference(lambda text: [1, *processor.encode(text)], processor.decode)
    yield compare(
        "sentencepiece, Mistral 7B in GGUF", gguf_tokenizer(processor), reference, strings
    )
    source = folder / "mistral"
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    scores = {token: processor.get_score(i) for token, i in vocabulary.items()}
    merges = generate_merges(vocabulary, scores)
    theirs = transformers.LlamaTokenizer(vocabulary, merges, add_bos_token=True)
    theirs.save_pretrained(source)
    reference = _transformers_reference(theirs)
    ours = read_hf_tokenizer(source, {})
    strings = varied_strings(count, seed, ("<s>", "</s>"))
    yield compare("transformers, Mistral 7B in a folder", ours, reference, strings)


def _transformers_rows(folder: Path, seed: int, count: int) -> Iterator[tuple[Row, list[str]]]:
    """A byte-level BPE tokenizer that transformers saves, with special and with other added
    tokens, and beginning of text by its own template or by the configuration."""
    import transformers
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(varied_strings(3000, seed + 1), trainer)
    backend.add_tokens(["<think>", "\n\n\n", "zz"])
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    for name, template, choice in (
        ("its own template", "<|begin|> <|im_start|> $A", {}),
        ("no template", None, {}),
        ("add_bos_token", "$A", {"add_bos_token": True}),
    ):
        if template:
            ids = [(token, backend.token_to_id(token)) for token in special]
            backend.post_processor = processors.TemplateProcessing(template, None, ids)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, additional_special_tokens=["<|extra|>"], **names, **choice
        )
        source = folder / "byte-level"
        theirs.save_pretrained(source)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = read_hf_tokenizer(source, {})
        strings = varied_strings(count, seed, (*special, "<think>", "zz", "<|extra|>"))
        yield compare(f"transformers, {name}", ours, _transformers_reference(theirs), strings)
        shutil.rmtree(source)


def chat_rows(folder: Path, templates: Mapping[str, str]) -> Iterator[tuple[Row, list[str]]]:
    """The prompts that transformers makes with chat templates, in the folder of a byte-level
    tokenizer."""
    import transformers
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    for name, template in templates.items():
        theirs.chat_template = template
        theirs.save_pretrained(folder)
        ours = read_hf_tokenizer(folder, {})
        lines = []
        prompts = (" hi ", "Why?\n", "<s>")
        for user in prompts:
            messages = [{"role": "user", "content": user}]
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
            expected = expected if isinstance(expected, list) else expected["input_ids"]
            if ours.encode_chat(user) != expected:
                lines.append(f"{name}: {user!r} becomes {ours.chat(user)!r}")
        yield (f"transformers, chat template {name}", len(prompts), len(lines)), lines


def _transformers_reference(theirs: Any) -> Reference:
    return Reference(theirs.encode, lambda ids: theirs.decode(ids, skip_special_tokens=True))
