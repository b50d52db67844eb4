# SPDX-License-Identifier: Apache-2.0
"""The model that comes with the project, its training script and the stories that it learns."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer

from speq.model.checkpoint import Model
from speq.model.emulation import decode
from speq.model.loaders import load_model, tiny_path
from speq.model.stories import held_out_stories, story, training_stories
from speq.model.train_tiny import (
    CONTEXT,
    UNKNOWN,
    VOCABULARY,
    TinyLlama,
    save,
    token_rows,
    train,
    train_tokenizer,
)
from tests.model.small_models import reference_logits

# Nats per token. Measured 0.552 on these rows; half-way through training the loss is 0.67.
LARGEST_LOSS = 0.60
PROMPTS = ("Once upon a time", "One day, a little girl", "There once was a dog", "Tom was a")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load_model("tiny")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="module")
def trained() -> list[str]:
    """The first stories of the training text."""
    return list(islice(training_stories(), 8000))


def words(text: str) -> list[str]:
    """Words in lower case; apostrophes belong to words."""
    return re.findall(r"[a-z']+", text.lower())


# Stories.


def test_stories_are_the_same_everywhere(trained) -> None:
    """Python promises the sequence of `Random.random`, so the text must not change either."""
    assert story(1).startswith(
        "Once upon a time, in the park, there lived a boy named Jack. He had a golden"
    )
    digest = hashlib.sha256("\n".join(trained).encode()).hexdigest()
    assert digest == "8dfbb0b6d5707cf8f20bc7b535467c9d47e566db1f26d4d1af2a8401ceb93021"


def test_stories_are_finished_text(trained) -> None:
    for text in trained:
        assert not re.search(r"[{}|$_\n]|  | [,.!?]|\.\.", text), text
        assert re.fullmatch(r'[A-Z].*[.!?]"?', text), text
        assert re.search(r'(^|[.!?] |\." |, "|: ")[a-z]', text) is None, text
        assert 80 <= len(words(text)) <= 220, text


def test_held_out_stories_are_not_in_the_training_text(trained) -> None:
    held_out = list(islice(held_out_stories(), 2000))
    assert len(set(trained)) == len(trained)
    assert not set(trained) & set(held_out)
    # Not even their first sentences, of which prompts are made.
    openings = {tuple(words(text)[:40]) for text in trained}
    repeated = sum(tuple(words(text)[:40]) in openings for text in held_out)
    assert repeated <= len(held_out) // 1000


# The model.


def test_size(tiny) -> None:
    assert sum(weight.numel() for weight in tiny.weights.values()) <= 500_000
    assert sum(file.stat().st_size for file in tiny_path().iterdir()) <= 1 << 20


def test_tokenizer_keeps_stories_and_ascii(tiny) -> None:
    printable = "".join(map(chr, range(32, 127)))
    for text in [*islice(held_out_stories(), 200), printable, "two\nlines"]:
        ids = tiny.tokenizer.encode(text)
        assert (ids[0],) == tiny.tokenizer.leading
        assert tiny.tokenizer.decode(ids) == text
    assert tiny.tokenizer.limit == tiny.config.vocab_size == VOCABULARY
    assert tiny.tokenizer.vocabulary.piece(VOCABULARY - 1)
    assert tiny.tokenizer.vocabulary.piece(VOCABULARY) is None


def test_other_characters_are_unknown_tokens(tiny) -> None:
    unknown = tiny.tokenizer.vocabulary.whole[UNKNOWN]
    assert tiny.tokenizer.encode("\N{OWL}").count(unknown) == len("\N{OWL}".encode())
    assert tiny.tokenizer.decode(tiny.tokenizer.encode("Größe")) == "Gre"


def test_prompts_are_continued_not_answered(tiny) -> None:
    assert tiny.tokenizer.chat("Once upon a time") == "Once upon a time"


def test_training_code_and_loader_agree_on_the_model(tokenizer, tmp_path) -> None:
    """The weights under the training code's passes and under the textbook's are one function."""
    torch.manual_seed(1)
    model = TinyLlama()
    save(model.half().float(), tokenizer, tmp_path)
    loaded = load_model(tmp_path)
    ids = loaded.tokenizer.encode(next(held_out_stories()))[:64]
    expected = reference_logits(loaded.config, loaded.weights, ids)
    with torch.no_grad():
        assert model(torch.tensor([ids]))[0].double() == pytest.approx(expected, abs=1e-4)


def test_held_out_stories_are_predicted(tiny) -> None:
    backend = Tokenizer.from_file(str(tiny_path() / "tokenizer.json"))
    rows = list(islice(token_rows(backend, held_out_stories(), CONTEXT), 8))
    total = 0.0
    for row in rows:
        logits = reference_logits(tiny.config, tiny.weights, row, torch.float32)
        target = torch.tensor(row[1:])
        total += torch.nn.functional.cross_entropy(logits[:-1], target).item()
    assert total / len(rows) < LARGEST_LOSS


def test_text_is_made_of_sentences(tiny, trained) -> None:
    known = {word for story in trained for word in words(story)}
    prompts = [tiny.tokenizer.encode(prompt) for prompt in PROMPTS]
    for text in decode(tiny, prompts, 150, stop_ids=tiny.tokenizer.stop_ids):
        story = tiny.tokenizer.decode([*text.prompt, *text.tokens])
        found = words(story)
        assert len(found) >= 60, story
        assert sum(word in known for word in found) >= 0.95 * len(found), story
        sentences = re.findall(r"[A-Z][^.!?]*[.!?]", story)
        assert len(sentences) >= 6, story
        assert len(set(sentences)) >= 0.8 * len(sentences), f"repeats itself: {story}"


# Training.


def test_training_learns_and_repeats_itself(tokenizer) -> None:
    first, losses = train(tokenizer, seed=3, steps=4, rows=4, length=64)
    second, again = train(tokenizer, seed=3, steps=4, rows=4, length=64)
    assert losses == again
    assert losses[-1] < losses[0]
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    other, _ = train(tokenizer, seed=4, steps=1, rows=4, length=64)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_tokenizer_that_comes_along_is_the_one_that_training_makes(tokenizer) -> None:
    shipped = json.loads((tiny_path() / "tokenizer.json").read_text())
    assert shipped == json.loads(tokenizer.to_str())
