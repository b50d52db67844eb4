# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: ids and text against the tokenizers package, what files may say, and chat prompts."""

from __future__ import annotations

import base64
import json
import os
import random
import resource
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from speq.model import chat, tokenizer
from speq.model.chat import Message
from speq.model.chat_template import TemplateRefusal, UnsupportedTemplate, render
from speq.model.checkpoint import CheckpointError
from speq.model.loaders import load_model, tokenizer_json
from speq.model.loaders.gguf_file import Metadata
from speq.model.loaders.gguf_tokenizer import knows, read_tokenizer
from speq.model.loaders.hf_tokenizer import read_tokenizer as read_folder
from speq.model.loaders.tokenizer_json import check_tokenizer
from speq.model.tokenizer import (
    TextStream,
    Tokenizer,
    TokenType,
    _splitter,
    from_backend,
    sentencepiece_bpe,
)
from tests.model.small_models import (
    MERGES,
    SPECIAL,
    VOCABULARY,
    byte_level_tokens,
    random_weights,
    sentencepiece_tokens,
    small_config,
    write_gguf,
    write_hf,
    write_llama2c,
)
from tests.oracle.tokenizers_check import varied_strings

SEED = int(os.environ.get("SPEQ_SEED", "0"))
PIECES = small_config(vocab_size=VOCABULARY["pieces"])
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = map(int, TokenType)
GGML = "tokenizer.ggml."


def gguf_fields(pieces: bool = False, **changes) -> dict:
    """Metadata of a small vocabulary; `changes` are keys below tokenizer.ggml, None removes one.
    `extra` are further tokens with their types."""
    extra = changes.pop("extra", {})
    if pieces:
        tokens, scores = sentencepiece_tokens()
        types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
        scores += [-1000.0] * len(extra)
        fields = {"model": "llama", "scores": np.array(scores, np.float32), "bos_token_id": 1}
    else:
        tokens = byte_level_tokens()
        types = [CONTROL] * len(SPECIAL) + [NORMAL] * (len(tokens) - len(SPECIAL))
        fields = {"model": "gpt2", "pre": "smollm", "merges": list(MERGES)}
    fields |= {"tokens": [*tokens, *extra], "token_type": np.array([*types, *extra.values()])}
    fields |= {"eos_token_id": 2}
    fields = {GGML + key: value for key, value in fields.items()}
    for key, value in changes.items():
        key = key.replace("__", ".")
        name = key if key.startswith(("tokenizer.", "general.")) else GGML + key
        fields[name] = value
    fields.setdefault("general.architecture", "llama")
    return {key: value for key, value in fields.items() if value is not None}


def gguf_tokenizer(pieces: bool = False, **changes) -> Tokenizer:
    return read_tokenizer(Metadata(gguf_fields(pieces, **changes)))


def names(ids: list[int], tokens: list[str]) -> list[str]:
    return [tokens[i] for i in ids]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, ids), stream.flush()])


# Encoding and decoding.


def test_byte_level_tokenizer(tmp_path):
    config = small_config()
    weights = random_weights(config, SEED)
    write_gguf(tmp_path / "model.gguf", config, weights)
    write_hf(tmp_path / "folder", config, weights)
    tokens = byte_level_tokens()
    for path in (tmp_path / "model.gguf", tmp_path / "folder"):
        tokenizer = load_model(path).tokenizer
        ids = tokenizer.encode("hello th 12<|im_end|>")
        assert [tokens[i] for i in ids] == ["hello", "Ġt", "h", "Ġ", "1", "2", "<|im_end|>"]
        text = "Grüße, 世界! \n\n  x"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([1, *ids]) == "hello th 12"
        assert tokenizer.decode(ids, skip_special=False) == "hello th 12<|im_end|>"
        assert tokenizer.chat("hi", system="be kind") == (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert tokenizer.limit == config.vocab_size


LLAMA3 = "We|'ll|Ġpay|Ġ|123|45|ĠEUR|!!|Ġ|Ġok|/Ã©|+aBc|/ĊĊ|x"
GPT2 = "We|'ll|Ġpay|Ġ12345|ĠEUR|!!|Ġ|Ġok|/|Ã©|+|aBc|/|Ċ|Ċ|x"
WORDS = {
    "default": "We|'|ll|Ġpay|Ġ|123|45|ĠEUR|!!|Ġ|Ġok|/|Ã©|+|aBc|/|Ċ|Ċ|x",
    "gpt-2": GPT2,
    **dict.fromkeys(("smollm", "refact", "starcoder"), GPT2.replace("Ġ12345", "Ġ|1|2|3|4|5")),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), LLAMA3),
    "qwen2": LLAMA3.replace("123|45", "1|2|3|4|5"),
    "tekken": LLAMA3.replace("123|45", "1|2|3|4|5").replace("aBc", "a|Bc"),
}


@pytest.mark.parametrize("splitter", WORDS)
def test_rules_that_cut_text_into_words(splitter):
    text = "We'll pay 12345 EUR!!  ok/é+aBc/\n\nx"
    words = pre_tokenizers.Sequence(_splitter(splitter)[1]).pre_tokenize_str(text)
    assert "|".join(word for word, _ in words) == WORDS[splitter]
    tokenizer = gguf_tokenizer(pre=splitter, bos_token_id=0)
    assert tokenizer.decode(tokenizer.vocabulary.encode(text)) == text


def test_words_that_are_tokens_are_not_merged():
    """ "hello" cannot be merged without "he"; Llama 3's rule takes the word as it is."""
    for splitter, expected in (("llama-bpe", ["hello"]), ("smaug-bpe", [*"hello"])):
        tokenizer = gguf_tokenizer(pre=splitter, merges=["Ġ t"], add_bos_token=False)
        assert names(tokenizer.encode("hello"), byte_level_tokens()) == expected


def test_normalisation_of_qwen():
    """As the published tokenizers: a letter with a combining accent is one character."""
    assert gguf_tokenizer(pre="qwen2").encode("e\u0301") == gguf_tokenizer().encode("é")
    assert gguf_tokenizer().encode("e\u0301") != gguf_tokenizer().encode("é")


def test_sentencepiece_tokenizer(tmp_path):
    weights = random_weights(PIECES, SEED)
    write_llama2c(tmp_path / "model.bin", PIECES, weights)
    write_gguf(tmp_path / "model.gguf", PIECES, weights, pieces=True)
    for name in ("model.bin", "model.gguf"):
        tokenizer = load_model(tmp_path / name).tokenizer
        pieces = names(tokenizer.encode("the inn"), sentencepiece_tokens()[0])
        # "▁the" is built of "▁t" and "he", the two best scores; "in" then "n".
        assert pieces == ["<s>", "▁the", "▁", "in", "n"]
        text = "the cat. Ü\n"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.chat("plain text") == "plain text"


def test_sentencepiece_merges_as_an_ordered_list_of_merges():
    """The same scores as a list of merges, in the tokenizers package; no two scores are equal."""
    chance = random.Random(SEED)
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcde"]
    while len(tokens) < 400:
        left, right = chance.choices(tokens[257:], k=2)
        if left + right not in tokens:
            tokens.append(left + right)
    scores = [0.0] * 257 + [-float(rank) for rank in chance.sample(range(1000), len(tokens) - 257)]
    types = [UNKNOWN, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 257)]
    ids = {token: i for i, token in enumerate(tokens)}
    cuts = [(token[:i], token[i:]) for token in tokens[257:] for i in range(1, len(token))]
    pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
    pairs.sort(key=lambda pair: -scores[ids["".join(pair)]])
    bpe = models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    vocabulary = sentencepiece_bpe(tokens, scores, types)
    for _ in range(300):
        text = "".join(chance.choices("abcde ü", k=chance.randint(1, 60)))
        assert vocabulary.encode(text) == backend.encode(text).ids, text


def test_equal_scores_merge_from_the_left():
    tokens = ["<unk>", "a", "aa", "aaa"]
    encode = sentencepiece_bpe(tokens, [0.0, 0, -1, -1], [NORMAL] * 4, prefix_space=False).encode
    assert encode("aaa") == [3] and encode("aaaaa") == [3, 2] and encode("axxa") == [1, 0, 1]
    with pytest.raises(ValueError, match="no token for 'x'"):
        sentencepiece_bpe(tokens[1:], [0.0] * 3, [NORMAL] * 3, False).encode("x")


# Types of tokens.

SPACES = {"\n\n": USER, "  ": USER, "<think>": USER, "▁▁▁": USER, "é→": USER, "<end>": CONTROL}


@pytest.mark.parametrize("pieces", [False, True], ids=["byte-level", "sentencepiece"])
def test_user_defined_tokens_are_text(pieces):
    prefix = {"add_space_prefix": False} if pieces else {}
    tokenizer = gguf_tokenizer(pieces, extra=SPACES, **prefix)
    whole = tokenizer.vocabulary.whole
    for text in ("a\n\nb  a\n", "<think>\n\n</think>  ", "   \n\n\n a", "é→é→"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
    ids = tokenizer.encode("a\n\nb  <think>")
    assert [whole["\n\n"], whole["  "], whole["<think>"]] == [
        i for i in ids if i in whole.values()
    ][-3:]
    assert tokenizer.decode(tokenizer.encode("a<end>b")) == "ab"
    if pieces:  # either spelling of a space
        assert whole["   "] in tokenizer.encode("a   b")


def test_space_before_text_and_behind_whole_tokens():
    """llama.cpp's rule; files without the prefix (Gemma) have neither."""
    tokens = [*sentencepiece_tokens()[0], "<end>", "<think>"]
    extra = {"<end>": CONTROL, "<think>": USER}
    for prefix, expected in ((True, "▁ a <end> ▁ b <think> ▁ c"), (False, "a <end> b <think> c")):
        tokenizer = gguf_tokenizer(True, extra=extra, add_space_prefix=prefix)
        assert names(tokenizer.encode("a<end>b<think>c"), tokens) == ["<s>", *expected.split()]


def test_types_as_llama_cpp_shows_them():
    kinds = {"<unk2>": UNKNOWN, "[PAD0]": UNUSED, "<0x41>": BYTE, "odd": 0, "<|im_end|>": NORMAL}
    tokenizer = gguf_tokenizer(True, extra={**kinds, "": NORMAL})
    first = len(sentencepiece_tokens()[0])
    assert tokenizer.encode("<unk2>")[-1] == first and tokenizer.decode([first]) == ""
    assert tokenizer.decode([first], skip_special=False).strip() == "<unk2>"
    assert tokenizer.decode([first + 1]) == tokenizer.decode([first + 3]) == ""
    assert tokenizer.decode([first + 2]) == "A"
    assert (
        first + 4 in tokenizer.stop_ids and tokenizer.decode([first + 4]) == ""
    )  # a control token
    without = gguf_tokenizer(True, token_type=None)
    assert without.decode([3 + 0x41]) == "A"


def test_equal_tokens():
    """Of equal tokens text becomes the last; all of them are shown."""
    extra = {"a": NORMAL, "[PAD]": UNUSED}
    tokenizer = gguf_tokenizer(extra=extra)
    twice = byte_level_tokens().index("a"), len(byte_level_tokens())
    assert tokenizer.encode("a") == [twice[1]] and tokenizer.decode(twice) == "aa"
    fields = gguf_fields(tokens=[*byte_level_tokens(), *["<unused>"] * 3])
    fields[GGML + "token_type"] = np.array([3] * 3 + [1] * (len(byte_level_tokens()) - 3) + [5] * 3)
    assert read_tokenizer(Metadata(fields)).encode("hello") == [len(byte_level_tokens()) - 2]


@pytest.mark.parametrize("pieces", [False, True], ids=["byte-level", "sentencepiece"])
def test_half_of_a_character_is_refused(pieces):
    with pytest.raises(ValueError, match=r"the text is no UTF-8: '\\udcff' at position 1"):
        gguf_tokenizer(pieces).encode("a\udcff")


@pytest.mark.parametrize("pieces", [False, True], ids=["byte-level", "sentencepiece"])
def test_ids_without_a_token_are_no_text(pieces):
    tokenizer = gguf_tokenizer(pieces)
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([-1, *ids, 10**6, 1 << 40]) == tokenizer.decode(ids) == "ab"


# Decoding against the tokenizers package, and streaming.


def backends() -> dict[str, tokenizers.Tokenizer]:
    """Tokenizers of tokenizer.json: byte-level, and SentencePiece with and without prefix space."""
    tokens = byte_level_tokens()
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    byte_level = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    found = {"byte-level": byte_level}
    for name, prefix in (("prefix", True), ("no prefix", False)):
        pieces = {token: i for i, token in enumerate(sentencepiece_tokens()[0])}
        merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n")]
        bpe = models.BPE(pieces, merges[1:2] + merges[3:], unk_token="<unk>", byte_fallback=True)
        backend = tokenizers.Tokenizer(bpe)
        prepend = [normalizers.Prepend("▁")] if prefix else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(content=" ", left=1)] if prefix else []
        chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*chain, *strip])
        found[name] = backend
    for backend in found.values():
        backend.add_special_tokens(["<s>", "<|im_end|>"])
        backend.add_tokens(["\n\n", "<think>", "▁▁", "zz"])
    return found


@pytest.mark.parametrize("kind", ["byte-level", "prefix", "no prefix"])
def test_decoding_and_streaming_as_the_package(kind):
    """Texts, and random ids, most of which make invalid UTF-8."""
    backend = backends()[kind]
    tokenizer = Tokenizer(from_backend(backend), frozenset())
    chance = random.Random(SEED)
    whole = ["<s>", "\n\n", "<think>", "zz"]
    cases = [backend.encode(text).ids for text in varied_strings(200, SEED, whole)]
    cases += [
        chance.choices(range(backend.get_vocab_size()), k=chance.randint(1, 40)) for _ in range(500)
    ]
    for ids in cases:
        for skip in (True, False):
            expected = backend.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special=skip) == expected, ids
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        half = len(ids) // 2
        behind = TextStream(tokenizer, ids[:half])
        before = TextStream(tokenizer)
        shown = "".join(map(before.push, ids[:half]))
        rest = "".join([*map(behind.push, ids[half:]), behind.flush()])
        assert shown + rest == tokenizer.decode(ids)


def test_text_is_streamed_as_soon_as_it_is_complete():
    tokenizer = gguf_tokenizer()
    stream = TextStream(tokenizer, tokenizer.encode("x"))
    assert [stream.push(token) for token in tokenizer.encode("a😀b")] == [
        "a",
        "",
        "",
        "",
        "😀",
        "b",
    ]
    assert stream.push(tokenizer.encode("é")[0]) == "" and stream.flush() == "\ufffd"


def test_streaming_takes_the_same_time_for_every_token():
    """Work is counted, not time: pieces that are looked at."""
    tokenizer = gguf_tokenizer()
    looked = []
    piece = tokenizer.vocabulary.piece
    counting = replace(tokenizer.vocabulary, piece=lambda i: looked.append(i) or piece(i))
    stream = TextStream(replace(tokenizer, vocabulary=counting))
    for token in tokenizer.encode("hello " * 100):
        stream.push(token)
    assert len(looked) == len(tokenizer.encode("hello " * 100))


# Metadata of GGUF files.


@pytest.mark.parametrize(
    ("changes", "leading"),
    [
        ({"pre": "llama-bpe", "bos_token_id": 0}, (0,)),
        ({"pre": "llama3", "bos_token_id": 0}, (0,)),
        ({"pre": "llama-v3", "bos_token_id": 0}, (0,)),
        ({"pre": "tekken", "bos_token_id": 0}, (0,)),
        ({"pre": "llama-bpe", "bos_token_id": 0, "add_bos_token": False}, ()),
        ({"pre": "smaug-bpe", "bos_token_id": 0}, ()),
        ({"pre": "qwen2", "bos_token_id": 0}, ()),
        ({"pre": "qwen2", "bos_token_id": 0, "add_bos_token": True}, (0,)),
        ({"pieces": True}, (1,)),
        ({"pieces": True, "bos_token_id": None}, (1,)),
        ({"pieces": True, "bos_token_id": 2}, (2,)),
        ({"pieces": True, "add_bos_token": False}, ()),
    ],
)
def test_beginning_of_text(changes, leading):
    tokenizer = gguf_tokenizer(**changes)
    assert tokenizer.leading == leading
    assert tuple(tokenizer.encode("a"))[: len(leading)] == leading
    assert len(tokenizer.encode("a")) == len(leading) + len(tokenizer.vocabulary.encode("a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer 't5' is not supported, only gpt2 and llama"),
        ({"pre": "falcon"}, "pre-tokenizer 'falcon' is not supported, only default, gpt-2"),
        ({"pre": "llama-bpe"}, "'tokenizer.ggml.bos_token_id' is missing"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"token_type": np.array([1, 3])}, "token_type has 2 entries for 264 tokens"),
        ({"pieces": True, "scores": None}, "'tokenizer.ggml.scores' is missing"),
        ({"pieces": True, "scores": np.zeros(3)}, r"\d+ tokens have 3 scores"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces = True is not supported"),
        ({"precompiled_charsmap": np.ones(9)}, "a list of 9. is not supported, only an empty list"),
        ({"normalizer__lowercase": True}, "normalizer.lowercase = True is not supported, only Fal"),
        ({"suppress_tokens": np.array([5])}, "suppress_tokens = .a list of 1. is not supported"),
        ({"add_sep_token": True}, "add_sep_token = True is not supported, only False"),
        ({"byte_shuffle": 3}, "field 'tokenizer.ggml.byte_shuffle' = 3 is not known"),
        ({"merges": ["a b c"]}, "a merge of the tokenizer is not two tokens"),
        ({"eos_token_id": "end"}, "eos_token_id' has the wrong type"),
    ],
)
def test_metadata_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        gguf_tokenizer(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_eos_token": True}, "add_eos_token = True is not followed"),
        ({"add_space_prefix": True}, "add_space_prefix = True has no meaning for byte-level BPE"),
        ({"pre": None}, "pre is missing: text is cut into words by llama.cpp's 'default' rule"),
        ({"tokenizer__magic": 1}, "'tokenizer.magic' is not known and not used"),
    ],
)
def test_metadata_is_warned_about_by_name(changes, message):
    with pytest.warns(UserWarning, match=message):
        gguf_tokenizer(**changes)


def test_metadata_without_influence():
    fields = ("fim_pre", "middle", "mask", "seperator", "padding", "unknown")
    changes: dict = {f"{name}_token_id": 1 for name in fields}
    changes |= {"remove_extra_whitespaces": False, "suppress_tokens": np.array([], np.int32)}
    changes |= {"tokenizer__chat_template__tool_use": "x", "tokenizer__huggingface__json": "{}"}
    assert gguf_tokenizer(**changes).encode("hello") == gguf_tokenizer().encode("hello")
    assert knows("tokenizer.ggml.pre") and not knows("llama.block_count")


def test_white_space_behind_special_tokens_of_phi3():
    extra = {"<|user|>": CONTROL, "<|end|>": CONTROL, "<|endoftext|>": CONTROL}
    phi, llama = (
        gguf_tokenizer(True, extra=extra, general__architecture=architecture)
        for architecture in ("phi3", "llama")
    )
    assert phi.encode("<|user|>\n hi<|end|>\n") == llama.encode("<|user|>hi<|end|>")
    assert phi.encode("<|endoftext|>\nhi") == llama.encode("<|endoftext|>\nhi")


def test_ends_of_a_turn_stop():
    ends = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")
    extra = dict.fromkeys(ends, CONTROL)
    tokenizer = gguf_tokenizer(True, extra=extra)
    assert {tokenizer.vocabulary.whole[token] for token in ends} <= tokenizer.stop_ids
    assert tokenizer.stop_ids == {2, *range(VOCABULARY["pieces"], VOCABULARY["pieces"] + 6)}
    html = gguf_tokenizer(extra={"</s>": USER, "<eos>": NORMAL}, eos_token_id=1)
    assert html.stop_ids == {0, 1, 2}  # not the HTML tag; two of the small vocabulary's by name
    assert html.decode(html.encode("a</s>b")) == "a</s>b"
    assert gguf_tokenizer(eot_token_id=7, eom_token_id=8).stop_ids == {0, 2, 7, 8}


# llama2.c.


def write_pieces(path: Path, entries: list[tuple[str, float]]) -> None:
    data = struct.pack("<i", 9)
    for text, score in entries:
        data += struct.pack("<fi", score, len(text.encode())) + text.encode()
    path.write_bytes(data)


def test_llama2c_tokenizers_of_other_sizes(tmp_path):
    write_llama2c(tmp_path / "model.bin", PIECES, random_weights(PIECES, SEED))
    tokens, scores = sentencepiece_tokens()
    entries = [(t.replace("▁", " "), s) for t, s in zip(tokens, scores, strict=True)]
    write_pieces(tmp_path / "tokenizer.bin", entries[:270])
    tokenizer = load_model(tmp_path / "model.bin").tokenizer
    assert tokenizer.decode(tokenizer.encode("the zoo")) == "the zoo"
    assert max(tokenizer.encode("the zoo")) < 270 and tokenizer.limit == PIECES.vocab_size
    assert tokenizer.decode([280]) == ""
    # The names of special tokens are text.
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"
    write_pieces(tmp_path / "tokenizer.bin", [*entries, ("more", -99.0)])
    with pytest.raises(CheckpointError, match=r"has more than the model's \d+ tokens"):
        load_model(tmp_path / "model.bin")
    write_pieces(tmp_path / "tokenizer.bin", entries[:200])
    with pytest.raises(CheckpointError, match="has 200 tokens, fewer than"):
        load_model(tmp_path / "model.bin")


# Hugging Face folders.


def write_folder(folder: Path, template: str | None = None, **files: dict) -> Path:
    """A small byte-level tokenizer.json, whose post-processor is `template`; `files` are the JSON
    files beside it."""
    folder.mkdir(exist_ok=True)
    backend = backends()["byte-level"]
    backend.add_special_tokens(list(SPECIAL))
    if template:
        ids = [(t, backend.token_to_id(t)) for t in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(template, None, ids)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("template", "config", "leading", "message"),
    [
        (None, {}, (), None),
        ("<|endoftext|> $A", {}, (0,), None),
        ("<|endoftext|> <|im_start|> $A", {}, (0, 1), None),
        ("$A <|im_end|>", {}, (), "ends every text with <|im_end|>"),
        ("<|endoftext|> $A <|im_end|>", {}, (0,), "ends every text with <|im_end|>"),
        (
            None,
            {"add_bos_token": True, "bos_token": "<|im_start|>"},
            (1,),
            "tokenizer_config.json be",
        ),
        ("<|im_start|> $A", {"add_bos_token": True, "bos_token": "<|im_start|>"}, (1,), None),
        ("<|im_start|> $A", {"add_bos_token": False}, (), "the former is followed"),
        ("<|im_start|> $A", {"add_eos_token": False}, (), "the former is followed"),
        (None, {"add_bos_token": True}, (), None),  # there is no such token
        (None, {"add_eos_token": True, "eos_token": "<|im_end|>"}, (), "ends every text with"),
    ],
)
def test_tokens_around_a_text(tmp_path, recwarn, template, config, leading, message):
    folder = write_folder(tmp_path / "folder", template, tokenizer_config=config)
    tokenizer = read_folder(folder, {})
    assert tokenizer.leading == leading
    plain = from_backend(backends()["byte-level"]).encode("hello")
    assert tokenizer.encode("hello") == [*leading, *plain]
    texts = [str(warning.message) for warning in recwarn]
    assert [message is not None and message in text for text in texts] == [True] * bool(message)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"split_special_tokens": True}},
            "split_special_tokens = True is not",
        ),
        ({"tokenizer_config": {"bos_token": 5}}, "bos_token = 5 is not a token"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token is 'yes'"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template is not a text"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}},
            "'<|im_end|>' has id 7, but 2 in tokenizer.json",
        ),
        ({"generation_config": {"eos_token_id": "end"}}, "eos_token_id is not a token id"),
    ],
)
def test_settings_are_refused_by_name(tmp_path, files, message):
    with pytest.raises(CheckpointError) as caught:
        read_folder(write_folder(tmp_path / "folder", **files), {})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"generation_config": {"repetition_penalty": 1.1}},
            "repetition_penalty = 1.1 not applied",
        ),
        ({"generation_config": {"suppress_tokens": [3]}}, r"suppress_tokens = \[3\] not applied"),
        (
            {"generation_config": {"novel": 1, "top_k": 5}},
            "generation_config.json: novel not known",
        ),
        ({"tokenizer_config": {"novel": 1}}, "tokenizer_config.json: novel not known and not used"),
        (
            {"tokenizer_config": {"chat_template": [{"name": "rag", "template": "x"}]}},
            r"no chat template is named 'default', only \['rag'\]",
        ),
    ],
)
def test_settings_are_warned_about_by_name(tmp_path, files, message):
    with pytest.warns(UserWarning, match=message):
        read_folder(write_folder(tmp_path / "folder", **files), {})


def test_settings_without_influence(tmp_path, recwarn):
    generation = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.0}
    config = {"model_max_length": 4096, "tokenizer_class": "GPT2Tokenizer", "padding_side": "left"}
    folder = write_folder(tmp_path / "a", generation_config=generation, tokenizer_config=config)
    assert read_folder(folder, {"eos_token_id": 5}).stop_ids == {0, 2, 5}
    assert not recwarn.list


def test_what_ends_a_reply(tmp_path):
    generation = {"eos_token_id": [7, 8]}
    folder = write_folder(tmp_path / "a", generation_config=generation)
    assert read_folder(folder, {"eos_token_id": 5}).stop_ids == {0, 2, 7, 8}
    folder = write_folder(
        tmp_path / "b", tokenizer_config={"eos_token": {"content": "<|im_start|>"}}
    )
    assert read_folder(folder, {}).stop_ids == {0, 1, 2}
    assert read_folder(folder, {"eos_token_id": 5}).stop_ids == {0, 2, 5}


def test_special_tokens_that_only_the_configuration_has(tmp_path):
    first = tokenizers.Tokenizer.from_file(
        str(write_folder(tmp_path / "folder") / "tokenizer.json")
    ).get_vocab_size()
    added = {
        str(first): {"content": "<tool>", "special": False},
        str(first + 1): {"content": "<pad>", "special": True},
    }
    config = {"added_tokens_decoder": added, "additional_special_tokens": ["<pad>", "<extra>"]}
    tokenizer = read_folder(write_folder(tmp_path / "folder", tokenizer_config=config), {})
    ids = [first, first + 1, first + 2]
    assert tokenizer.encode("<tool><pad><extra>") == ids
    assert tokenizer.decode(ids) == "<tool>"


def test_tokens_beyond_the_embedding(tmp_path):
    """As Gemma 3, whose last token has the id that is the vocabulary's size; only a text that needs
    it is refused. Configuration files may have more than 1 MiB."""
    config = small_config()
    write_hf(tmp_path / "folder", config, random_weights(config, SEED))
    path = tmp_path / "folder/tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<image_soft_token>"])
    assert backend.token_to_id("<image_soft_token>") == config.vocab_size
    backend.save(str(path))
    large = {"model_max_length": 1, "name_or_path": "x" * (1 << 20)}
    (tmp_path / "folder/tokenizer_config.json").write_text(json.dumps(large))
    tokenizer = load_model(tmp_path / "folder").tokenizer
    assert tokenizer.encode("hello") == backend.encode("hello").ids
    for encode in (tokenizer.encode, tokenizer.encode_chat):
        with pytest.raises(
            ValueError, match=r"needs token '<image_soft_token>' \(id 264\), .* 0\.\.263"
        ):
            encode("a<image_soft_token>")
    ids = [("<image_soft_token>", config.vocab_size)]
    backend.post_processor = processors.TemplateProcessing("<image_soft_token> $A", None, ids)
    backend.save(str(path))
    with pytest.raises(CheckpointError, match="every text begins with token 264"):
        load_model(tmp_path / "folder")


def test_decoders_of_other_kinds_are_refused(tmp_path):
    folder = write_folder(tmp_path / "folder")
    for decoder, name in ((decoders.WordPiece(), "WordPiece"), (None, "None")):
        backend = backends()["byte-level"]
        if decoder is None:
            stored = json.loads(backend.to_str()) | {"decoder": None}
            backend = tokenizers.Tokenizer.from_str(json.dumps(stored))
        else:
            backend.decoder = decoder
        backend.save(str(folder / "tokenizer.json"))
        with pytest.raises(CheckpointError, match=f"decoder {name} is not supported"):
            read_folder(folder, {})


JUNK = (None, True, -1, 0, 5, 1e300, 1 << 70, "", "x", [], [[]], {}, {"content": 5}, [5], {"a": 1})


def test_settings_of_any_kind_load_or_are_refused(tmp_path):
    chance = random.Random(SEED)
    config = {"add_bos_token": True, "bos_token": "<|im_start|>", "added_tokens_decoder": {}}
    config |= {"additional_special_tokens": [], "extra_special_tokens": {}, "chat_template": CHATML}
    config |= {"split_special_tokens": False, "image_token": "x"}
    generation = {"eos_token_id": 5, "repetition_penalty": 1.0, "bad_words_ids": None}
    refused = 0
    for _ in range(200):
        files = {
            "tokenizer_config": dict(config),
            "generation_config": dict(generation),
            "special_tokens_map": {"eos_token": "<|im_end|>"},
        }
        changed = files[chance.choice([*files])]
        for key in chance.sample([*changed], 1):
            changed[key] = chance.choice(JUNK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tokenizer = read_folder(write_folder(tmp_path / "folder", **files), {})
                assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
                tokenizer.chat("hi", "there")
            except CheckpointError:
                refused += 1
    assert 25 < refused < 175


def test_changed_templates_end():
    chance = random.Random(SEED)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    ended = 0
    for template in [*TEMPLATES.values()] * 60:
        for _ in range(chance.randint(1, 4)):
            start, end = sorted(chance.choices(range(len(template)), k=2))
            part = template[start : min(end, start + 20)]
            where = chance.randrange(len(template))
            template = template[:where] + part + template[where + chance.randrange(3) :]
        try:
            render(template, {"messages": messages, "bos_token": "<s>"})
        except (UnsupportedTemplate, TemplateRefusal):
            ended += 1
    assert 100 < ended < 480


# Chat.

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe terse.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role']"
    " + '\n' + message['content'] | trim + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_chat_template_decides(tmp_path):
    config = {"bos_token": "<|endoftext|>", "chat_template": CHATML}
    post = "<|endoftext|> $A"
    tokenizer = read_folder(write_folder(tmp_path / "a", post, tokenizer_config=config), {})
    assert tokenizer.chat(" hi ") == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # No beginning of text, because the template writes none; one that does writes the only one.
    assert tokenizer.encode_chat("hi")[0] == 1
    opened = replace(tokenizer, chat_template="{{ bos_token }}" + CHATML)
    assert opened.encode_chat("hi")[:2] == [0, 1]
    assert tokenizer.encode_chat("hi") == opened.encode_chat("hi")[1:]
    without = replace(tokenizer, chat_template="")
    assert without.encode_chat("hi")[:2] == [0, 1]


def test_where_the_chat_template_is(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = write_folder(tmp_path / "a", tokenizer_config={"chat_template": named})
    assert read_folder(folder, {}).chat("hi") == "yes"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    with pytest.warns(UserWarning, match=r"chat_template\.jinja .* differ: the former is followed"):
        assert read_folder(folder, {}).chat("hi") == "hi!"
    template = gguf_tokenizer(tokenizer__chat_template="{{ eos_token }}{{ messages[0].content }}")
    assert template.chat("hi") == "<|im_end|>hi"
    assert template.has_chat_format


def test_a_template_that_cannot_be_followed_is_named():
    tokenizer = gguf_tokenizer(
        pre="llama-bpe", bos_token_id=0, tokenizer__chat_template="{{ messages | groupby('role') }}"
    )
    with pytest.warns(UserWarning, match="not followed .filter 'groupby'.; .* special tokens"):
        ids = tokenizer.encode_chat("hi")
    assert tokenizer.decode(ids, skip_special=False).startswith("<|im_start|>user\nhi<|im_end|>")
    mentions = replace(tokenizer, chat_template="{{ bos_token }}{{ messages | groupby('role') }}")
    with pytest.warns(UserWarning, match="groupby"):
        assert mentions.encode_chat("hi")[:2] == [0, 1]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (
            ["<|start_header_id|>", "<|end_header_id|>"],
            "<|start_header_id|>system<|end_header_id|>",
        ),
        (["<start_of_turn>"], "<start_of_turn>user\nbe\n\nhi<end_of_turn>\n<start_of_turn>model\n"),
        (["<|user|>", "<|end|>"], "<|system|>\nbe<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n"),
        (["<|user|>"], "be\n\nhi"),
        (
            ["<|start_of_role|>"],
            "<|start_of_role|>system<|end_of_role|>be<|end_of_text|>\n<|start_of_role|>user"
            "<|end_of_role|>hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        ),
        (["[INST]"], "[INST]be\n\nhi[/INST]"),
    ],
)
def test_formats_without_a_template(tokens, expected):
    tokenizer = gguf_tokenizer(True, extra=dict.fromkeys(tokens, CONTROL))
    assert tokenizer.chat("hi", "be").startswith(expected)
    assert tokenizer.has_chat_format == (tokens != ["<|user|>"])
    assert tokenizer.encode_chat("hi")[0] == 1


CONVERSATION = [
    Message("system", "be"),
    Message("user", "hi"),
    Message("assistant", "yes"),
    Message("user", "and"),
]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nand<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            ["<start_of_turn>"],
            "<start_of_turn>user\nbe\n\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
            "<start_of_turn>user\nand<end_of_turn>\n<start_of_turn>model\n",
        ),
        (["[INST]"], "[INST]be\n\nhi[/INST]yes</s>[INST]and[/INST]"),
        ([], "be\n\nhi\n\nyes\n\nand"),
    ],
)
def test_conversations_without_a_template(tokens, expected):
    whole = {token: i for i, token in enumerate(tokens)}
    assert chat.prompt("", {}, whole, CONVERSATION) == (expected, False)


def test_conversations_go_through_the_template():
    tokenizer = gguf_tokenizer(tokenizer__chat_template=CHATML)
    ids = tokenizer.encode_messages(CONVERSATION)
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nand<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.encode_messages(CONVERSATION[:2]) == tokenizer.encode_chat("hi", "be")


@pytest.mark.parametrize(
    ("template", "tokens", "reason"),
    [
        (CHATML, [], None),
        ("", ["<|im_start|>", "<|im_end|>"], None),
        ("", ["[INST]"], "chat format has no system messages"),
        ("", [], "has no chat format"),
        ("{{ messages[1].content }}", [], "template leaves it out"),
        ("{{ messages[0].content }}", [], None),
        ("{{ raise_exception('no system role') }}", ["<|im_start|>"], "refuses it: no system role"),
        ("{{ messages | groupby('role') }}", ["<|im_start|>", "<|im_end|>"], None),
    ],
)
def test_why_a_system_message_cannot_be_given(template, tokens, reason):
    found = chat.system_refusal(template, {}, {token: i for i, token in enumerate(tokens)})
    assert found is None if reason is None else reason in found


TEMPLATES = {
    "chatml": CHATML,
    "header": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim"
        " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
        "content %}{% endif %}"
        "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "refuses the system": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles') }}{% endif %}{% set role = 'model' if m.role == "
        "'assistant' else "
        "m.role %}{{ '<start_of_turn>' ~ role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}"
    ),
    "whitespace control": (
        "{%- if tools %}\n    tools\n{%- endif %}\n{%- set ns = "
        "namespace(last=messages|length - 1, "
        "found=false) %}\n{%- for m in messages[::-1] %}\n    {%- set i = (messages|length - 1) - "
        "loop.index0 %}\n    {%- if not ns.found and m.role == 'user' %}\n        "
        "{%- set ns.found = "
        "true %}\n        {%- set ns.last = i %}\n    {%- endif %}\n{%- endfor %}\n{{- ns.last }}\n"
        "  {# a comment #}\n  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\nend\n"
    ),
    "macro": (
        "{% macro turn(role, text='-', sep=':') %}[{{ role }}{{ sep }}{{ text|upper "
        "}}]{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ turn(m.role, m.content) "
        "}}{{ turn('x', sep='') "
        "}}{% else %}none{% endfor %}"
    ),
    "tests": (
        "{{ tools is none }}{{ x is defined }}{{ messages is iterable }}{{ messages[0].content is "
        "string }}{{ 'user' in messages[0].values() }}{{ x is not defined and not x "
        "}}{{ messages[5] }}"
        "{{ [1, 2.5, 'a', none, true] }}{{ {'a': 1} | tojson }}{{ 7 // 2 }}{{ 7 % 4 }}{{ -3 + 1 }}"
        "{{ (1 < 2 <= 2) ~ (3 != 3) }}{{ x | default('d') }}{{ ['a', 'b'] | join(', ') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ "
        "(messages|first).role"
        " }}{{ messages | map(attribute='role') | join }}"
    ),
    "methods": (
        "{% set text = messages[-1].content %}{{ text.strip() }}|{{ text.split('i')[0] }}|{{ "
        "text.startswith(' h') }}|{{ text.replace('h', 'H') }}|{{ text[1:-1] }}|{{ text[0] }}|{{ "
        "messages[0].get('none', 'd') }}|{{ messages[0].items() | list | length "
        "}}|{{ text.rstrip().lower("
        ").title() }}{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}"
    ),
    "loops": (
        "{% for i in range(6) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}"
        "{% endif %}{{ loop.index }}{{ loop.last }}{{ loop.revindex }} {% endfor "
        "%}{% set y %}block{{ 1 "
        "}}{% endset %}{{ y }}{% for a in [] %}x{% else %}empty{% endfor %}{{ loop is defined }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_as_jinja_runs_them(name):
    """The templates of this file are trusted: Jinja, set up as transformers does, runs them."""

    def refuse(message: str) -> None:
        raise TemplateRefusal(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"], ["user", "user"]):
        messages = [{"role": role, "content": f" hi <{role}> \n"} for role in roles]
        values = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>"}
        values |= {"tools": None, "documents": None, "add_generation_prompt": True}
        outcome = []
        for run in (environment.from_string(TEMPLATES[name]).render, None):
            try:
                outcome.append(run(**values) if run else render(TEMPLATES[name], values))
            except TemplateRefusal as refusal:
                outcome.append(f"refused: {refusal}")
        assert outcome[0] == outcome[1]


def test_a_system_message_that_the_template_refuses_goes_before_the_users():
    tokenizer = gguf_tokenizer(tokenizer__chat_template=TEMPLATES["refuses the system"])
    assert tokenizer.chat("hi", "be kind") == "<start_of_turn>user\nbe kind\n\nhi<end_of_turn>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "of what is undefined"),
        ("{{ messages.append(1) }}", "method 'append'"),
        ("{{ raise_exception }}", "a function is printed"),
        ("{{ raise_exception.__globals__.x }}", "undefined"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", "undefined"),
        ("{% include 'x' %}", "statement 'Include'"),
        ("{% import 'x' as y %}", "statement 'Import'"),
        ("{{ lipsum() }}", "function 'lipsum'"),
        ("{{ messages | attr('x') }}", "filter 'attr'"),
        ("{{ 'a' * 999999999 }}", "between other things than numbers"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "expression 'Pow'"),
        ("{{ '%099999999999d' % 1 }}", "between other things than numbers"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for i in range(999999999) %}{% endfor %}", "a range is too long"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = x + x + x + x + x + x %}" * 20, "too long"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = x.replace('a', x) %}" * 20, "too long"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deeply"),
        ("{% macro f() %}{{ f() ~ f() }}{% endmacro %}{{ f() }}", "deeply|steps"),
        ("(" * 3 + "{{" + "(" * 9999 + "1" + ")" * 9999 + "}}", "deeply|not a Jinja template"),
        ("{% if %}", "not a Jinja template"),
        ("{% break %}", "a loop that it is not in"),
        ("{% set x = [1, 2, 3] %}" + "{% set x = [x, x, x] %}" * 40 + "{{ x }}", "too long"),
        ("{% set x = [1] %}" + "{% set x = x + x %}" * 40, "too long"),
        ("{% set n = namespace() %}{% set n.x = [n] %}{{ [n, n] }}", "too long"),
        ("{{ 9" + "9" * 6000 + " }}", "value|number"),
        ("x" * (1 << 21), "longer than"),
        ("{{ messages[0].content.nothing.more }}", "undefined"),
        ("{{ 1 // 0 }}", "an expression has no value"),
        ("{{ '{0.__class__}'.format(messages) }}", "method 'format'"),
    ],
)
def test_hostile_templates_end(template, message):
    values = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(UnsupportedTemplate, match=message):
        render(template, values)


# Hostile tokenizer.json files.


def write_json(folder: Path, **changes) -> Path:
    """A folder whose tokenizer.json is a small one with other parts."""
    write_folder(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def replace_step(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "normalizers": [*steps]}


def charsmap(blob: bytes) -> dict:
    return {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(blob).decode(),
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def template(single: list, **special: list) -> dict:
    tokens = {name: {"id": name, "ids": ids, "tokens": []} for name, ids in special.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


HOSTILE = {
    "one letter becomes ten, ten times": (
        {"normalizer": sequence(*[replace_step("a", 10 * "a")] * 10)},
        "Replace and the steps before it can make a text more than 4096 times as long",
    ),
    "in sequences of sequences": (
        {"normalizer": sequence(*[sequence(*[replace_step("a", 10 * "a")] * 2)] * 2)},
        "more than 4096 times as long",
    ),
    "an expression that matches everywhere": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": 5000 * "a"}},
        "more than 4096 times as long",
    ),
    "an empty text that is replaced": (
        {"normalizer": replace_step("", 5000 * "a")},
        "more than 4096 times as long",
    ),
    "texts before the text": (
        {"normalizer": sequence(*[{"type": "Prepend", "prepend": 99 * "a"}] * 2)},
        "Prepend and the steps before it",
    ),
    "a letter with a long text in a character map": (
        {"normalizer": charsmap(bytes(4) + 5000 * b"a" + b"\0")},
        "Precompiled and the steps before it",
    ),
    "bytes of bytes of bytes": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 9}},
        "ByteLevel and the steps before it",
    ),
    "normalisers and pre-tokenizers together": (
        {
            "normalizer": replace_step("a", 200 * "a"),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 2},
        },
        "ByteLevel and the steps before it",
    ),
    "many steps": (
        {
            "normalizer": sequence(
                *[{"type": "Strip", "strip_left": True, "strip_right": True}] * 65
            )
        },
        "more than 64 steps, the last a normalizer",
    ),
    "a text twice, many times": (
        {"post_processor": {"type": "Sequence", "processors": [template([TEXT, TEXT])] * 40}},
        "must have the text once",
    ),
    "many tokens around a text": (
        {"post_processor": template([TEXT, *[{"SpecialToken": {"id": "t"}}] * 11], t=[0] * 100)},
        "between at most 1024 tokens",
    ),
    "an unknown normaliser": ({"normalizer": {"type": "Novel"}}, "normalizer 'Novel' is not"),
    "a normaliser of no type": ({"normalizer": [1]}, "normalizer None is not supported"),
    "deep nesting": ({"added_tokens": "deep"}, "is not valid JSON"),
    "tokens at random": ({"model": {"type": "BPE", "dropout": 0.5}}, "dropout = 0.5"),
    "no model": ({"model": None}, "it has no model"),
    "a content that is no text": (
        {"normalizer": replace_step("a", 5)},
        "content of Replace is not",
    ),
    # What the package fails on: with an error, or with a panic.
    "an expression that is none": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": "a"}},
        "unmatched parenthesis",
    ),
    "a short character map": ({"normalizer": charsmap(b"ab")}, "cannot cope with it"),
    "a character map that leads out of itself": (
        {"normalizer": charsmap(b"\x08\0\0\0" + 8 * b"\xff" + b"x\0")},
        "cannot cope with it: index out of bounds",
    ),
    "a character map that is not base64": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "*"}},
        "is not base64",
    ),
    "words of length 0": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers_are_refused(tmp_path, capfd, name):
    """In time and in memory, and without a word of the package's own."""
    changes, message = HOSTILE[name]
    folder = write_json(tmp_path / "folder", **changes)
    path = folder / "tokenizer.json"
    if changes == {"added_tokens": "deep"}:
        path.write_text(path.read_text().replace('"deep"', "[" * 99_999))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder, {})
    assert str(caught.value).startswith("tokenizer.json: ")
    assert message in str(caught.value)
    assert capfd.readouterr() == ("", "")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 17  # KiB


def test_keys_that_are_there_twice_are_refused(tmp_path):
    """Python takes the last of them; another reader might not."""
    path = write_folder(tmp_path / "folder") / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace("{", '{"normalizer": null, "normalizer": null, ', 1))
    with pytest.raises(CheckpointError, match="has a key twice"):
        read_folder(path.parent, {})


def test_real_tokenizers_are_within_the_limits(tmp_path):
    """What published files chain: Llama 2's and Phi-3's, XLM-R's, Qwen's."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\p{N}"},
        "behavior": "Isolated",
        "invert": False,
    }
    for normalizer, words in (
        (sequence({"type": "Prepend", "prepend": "▁"}, replace_step(" ", "▁")), None),
        (sequence(charsmap(bytes(4) + 33 * b"a" + b"\0"), replace_step("  ", " ")), metaspace),
        ({"type": "NFC"}, {"type": "Sequence", "pretokenizers": [split, BYTES]}),
        (sequence({"type": "NFKC"}, {"type": "Lowercase"}, {"type": "NFD"}), BYTES),
    ):
        parts = {"normalizer": normalizer, "pre_tokenizer": words, "model": {"type": "BPE"}}
        check_tokenizer(json.dumps(parts).encode())


def test_counts_are_checked_before_vocabularies_are_built(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_json, "_MAX_TOKENS", 5)
    folder = write_folder(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"vocab has [0-9]+ entries, more than 5"):
        read_folder(folder, {})
    monkeypatch.setattr(tokenizer_json, "_MAX_VALUES", 100)
    with pytest.raises(CheckpointError, match="it holds more than 100 values"):
        read_folder(folder, {})
    monkeypatch.setattr(tokenizer, "_MAX_TOKENS", 100)
    for pieces in (False, True):
        with pytest.raises(CheckpointError, match=r"tokenizer has [0-9]+ tokens, more than 100"):
            gguf_tokenizer(pieces)


def test_vocabularies_without_an_unknown_token(tmp_path):
    """They load, and a text that they have no token for is refused."""
    models = {
        "WordLevel": {"vocab": {"hello": 0}, "unk_token": "[UNK]"},
        "BPE": {"vocab": {"hello": 0, "h": 1}, "merges": [], "unk_token": "[UNK]"},
    }
    for kind, model in models.items():
        folder = write_json(
            tmp_path / kind, model={"type": kind, **model}, added_tokens=[], pre_tokenizer=None
        )
        read = read_folder(folder, {})
        assert read.encode("h" if kind == "BPE" else "hello") == [kind == "BPE"]
        with pytest.raises(ValueError, match=r"fails on the text: .*UNK"):
            read.encode("z")


def test_a_panic_in_a_text_is_an_error(tmp_path, capfd):
    """Of a character map whose damaged part only some letters lead to."""

    class Panics:
        def encode(self, *_, **__):
            class PanicException(BaseException):
                pass

            os.write(2, b"thread '<unnamed>' panicked")
            raise PanicException("index out of bounds")

    with pytest.raises(ValueError, match=r"fails on the text: .*cannot cope with it: index out of"):
        tokenizer._encoder(Panics())("a")
    assert capfd.readouterr() == ("", "")

    class Interrupted:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenizer._encoder(Interrupted())("a")
    print("still there", file=sys.stderr)
    assert capfd.readouterr().err == "still there\n"


def test_encoding_without_standard_error(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", None)
    assert names(gguf_tokenizer().encode("hello"), byte_level_tokens()) == ["hello"]
