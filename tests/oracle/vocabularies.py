# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, compared with those of transformers and sentencepiece on varied strings.

Vocabularies are trained on the project's documents. transformers' own classes say how GPT-2, Qwen 2
and Llama 3 cut text into words, and sentencepiece is what Llama 2 and Gemma were tokenised with.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import gguf
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from speq.model.loaders import load_model, smollm2_path
from speq.model.tokenizer import Tokenizer
from tests.model.test_tokenizer import TEMPLATES
from tests.oracle.cases import Case, model
from tests.oracle.gguf_models import KINDS, GgufCase, write
from tests.oracle.hf_models import build
from tests.oracle.table import Check, Row
from tests.oracle.tokenizers_check import (
    Reference,
    chat_rows,
    compare,
    rows,
    varied_strings,
)

STRINGS = 300
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DOCUMENTS = Path(__file__).parents[2] / "docs"


def as_rows(found: Iterable[tuple[tuple[str, int, int], list[str]]]) -> Iterator[Row]:
    """Rows of the table from those of `tokenizers_check`."""
    for (name, count, differing), lines in found:
        note = f"{count} strings" + (f", first: {lines[0]:.100}" if lines else "")
        yield Row(name, differing, 0, note)


def compared(tokenizer: Tokenizer, reference: Reference, strings: Sequence[str]) -> Iterator[Row]:
    """Strings that become other ids, and ids that become another text, at once or streamed."""
    yield from as_rows([compare("ids, text, stream", tokenizer, reference, strings)])


def byte_level_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train(sorted(map(str, DOCUMENTS.glob("*.md"))), trainer)
    # The trainer keeps the merges; its JSON is the only place that tells them.
    trained = json.loads(backend.to_str())["model"]
    return sorted(trained["vocab"], key=trained["vocab"].get), list(map(tuple, trained["merges"]))


def byte_level(pre: str, tokens: list[str], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """How transformers builds a tokenizer of that family (GGUF's name of the rule)."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if pre == "gpt-2":
        return GPT2Tokenizer(vocabulary, merges).backend_tokenizer
    if pre == "qwen2":
        return Qwen2Tokenizer(vocabulary, merges).backend_tokenizer
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def load(folder: Path, tokens: int, add: Callable[[gguf.GGUFWriter], None]) -> Tokenizer:
    """The tokenizer of a small GGUF file to which `add` adds it."""
    folder.mkdir()
    path = folder / "model.gguf"
    settings = model("llama", vocab_size=tokens, hidden_size=32, num_hidden_layers=1)
    write(path, GgufCase("", "llama", settings, pairs=True), KINDS.F16, 0, add)
    return load_model(path).tokenizer


def check_byte_level(pre: str, in_gguf: bool, folder: Path, seed: int) -> Iterator[Row]:
    tokens, merges = byte_level_vocabulary()
    backend = byte_level(pre, tokens, merges)
    backend.add_special_tokens(SPECIAL)
    other = PreTrainedTokenizerFast(tokenizer_object=backend)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)

    if in_gguf:
        ours = load(folder, len(tokens), add)
    else:
        build(folder, Case("", model("llama", vocab_size=len(tokens))), seed)
        other.save_pretrained(folder)
        ours = load_model(folder).tokenizer
    reference = Reference(
        lambda text: other.encode(text, add_special_tokens=False),
        lambda ids: other.decode(ids, skip_special_tokens=True),
    )
    yield from compared(ours, reference, varied_strings(STRINGS, seed, SPECIAL))


def check_smollm2(folder: Path, seed: int) -> Iterator[Row]:
    path = smollm2_path()
    other = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers does not read GGUF's name of the rule; this one takes digits one by one.
    backend = other.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    reference = Reference(
        lambda text: other.encode(text, add_special_tokens=False),
        lambda ids: other.decode(ids, skip_special_tokens=True),
    )
    strings = varied_strings(STRINGS, seed, SPECIAL)
    yield from compared(load_model(path).tokenizer, reference, strings)


def check_others(folder: Path, seed: int) -> Iterator[Row]:
    folder.mkdir()
    yield from as_rows(rows(folder, seed))


def check_chat(folder: Path, seed: int) -> Iterator[Row]:
    """Prompts by chat templates: a published one and those of the tests."""
    published = load_model(smollm2_path()).tokenizer.chat_template
    yield from as_rows(chat_rows(folder, {"SmolLM2": published, **TEMPLATES}))


def checks() -> list[Check]:
    others = [
        Check("tokenizers of others", check_others),
        Check("chat prompts", check_chat),
        Check("tokenizer SmolLM2", check_smollm2),
    ]
    families = [
        Check(
            f"tokenizer {pre}",
            lambda folder, seed, pre=pre, one=one: check_byte_level(pre, one, folder, seed),
            "GGUF" if one else "folder",
        )
        for pre in ("gpt-2", "qwen2", "llama-bpe")
        for one in (True, False)
    ]
    return [*families, *others]
