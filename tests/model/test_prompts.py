# SPDX-License-Identifier: Apache-2.0
"""The shipped prompts are as many and as separate as they must be; files of prompts are checked."""

from __future__ import annotations

import json
from itertools import chain

import pytest

from speq.model.prompts import first_of_each, read_prompts, shipped_prompts

KINDS = {"chat", "code", "math", "story", "translation"}
COMMON_WORDS = 5  # as many in a row must not occur in both calibration and evaluation


def every(prompts: dict[str, list[str]]) -> list[str]:
    return list(chain.from_iterable(prompts.values()))


def sequences(texts: list[str]) -> set[tuple[str, ...]]:
    """All sequences of COMMON_WORDS words in lower case without punctuation."""
    found = set()
    for text in texts:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        found |= {tuple(words[i : i + COMMON_WORDS]) for i in range(len(words) - COMMON_WORDS + 1)}
    return found


def test_chat_prompts():
    evaluation, calibration = shipped_prompts("evaluation"), shipped_prompts("calibration")
    assert set(evaluation) == set(calibration) == KINDS
    assert all(len(texts) >= 8 for texts in evaluation.values())
    assert len(every(evaluation)) >= 40
    assert all(len(texts) >= 4 for texts in calibration.values())


def test_story_openings():
    evaluation = every(shipped_prompts("evaluation", raw=True))
    assert len(evaluation) >= 40
    assert len(every(shipped_prompts("calibration", raw=True))) >= 10
    assert all(text == text.strip() for text in evaluation)


@pytest.mark.parametrize("raw", [False, True])
def test_calibration_and_evaluation_have_nothing_in_common(raw):
    evaluation = every(shipped_prompts("evaluation", raw))
    calibration = every(shipped_prompts("calibration", raw))
    assert len(set(evaluation + calibration)) == len(evaluation) + len(calibration)
    shared = sequences(evaluation) & sequences(calibration)
    assert not shared
    assert sequences(["Once, a B c d E."]) & sequences(["so once A b C d e f"])  # it can fail


def test_first_of_each():
    prompts = {"a": ["1", "2", "3"], "b": ["4"]}
    assert first_of_each(prompts, 2) == {"a": ["1", "2"], "b": ["4"]}
    assert first_of_each(prompts, None) == prompts


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"chat": ["Wie geht es dir, Jürgen?"]}', encoding="utf-8")
    assert read_prompts(path) == {"chat": ["Wie geht es dir, Jürgen?"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON file"),
        (b"\xff\xfe\x00", "is no JSON file"),
        (b"[" * 100_000, "is nested too deeply"),
        (json.dumps(["a"]).encode(), "must hold an object"),
        (b"{}", "must hold an object"),
        (b'{"chat": "hello"}', "kind 'chat' must be a list of non-empty texts"),
        (b'{"chat": []}', "kind 'chat' must be a list"),
        (b'{"chat": ["a", 3]}', "kind 'chat' must be a list"),
        (b'{"chat": ["a", "  "]}', "kind 'chat' must be a list"),
    ],
)
def test_broken_files_of_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)
