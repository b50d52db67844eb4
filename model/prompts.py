# SPDX-License-Identifier: Apache-2.0
"""The prompts of `speq eval`: what is evaluated, and what settings are chosen on.

`prompts.json` beside this file holds two sets, for models that follow a chat format and for models
that only continue text (story openings), each with prompts for evaluation and, apart from them, for
calibration. Within each, a *kind* of text maps to its prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from speq.model.input_file import read_limited

#: Kind of text -> prompts.
Prompts = dict[str, list[str]]

_SHIPPED = Path(__file__).with_name("prompts.json")
_MAX_PROMPTS = 1 << 26  # bytes


def shipped_prompts(purpose: str, raw: bool = False) -> Prompts:
    """The project's own prompts.

    Parameters
    ----------
    purpose : "evaluation" or "calibration"
    raw : bool
        Text to be continued (story openings) instead of messages to be answered.
    """
    sets = json.loads(_SHIPPED.read_text(encoding="utf-8"))
    return sets["story models" if raw else "chat models"][purpose]


def read_prompts(path: Path) -> Prompts:
    """Prompts from a JSON file: an object that maps each kind of text to a list of prompts.

    Raises
    ------
    ValueError
        If the file holds something else.
    OSError
        If it cannot be read.
    """
    content = read_limited(path, _MAX_PROMPTS)
    try:
        prompts = json.loads(content.decode("utf-8"))
    except ValueError as error:  # broken JSON or UTF-8
        raise ValueError(f"{path} is no JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a file of prompts") from error
    if not isinstance(prompts, dict) or not prompts:
        raise ValueError(f"{path} must hold an object that maps kinds to lists of prompts")
    for kind, texts in prompts.items():
        if not kind.isprintable() or kind == "all":  # printed as it is, beside the figures of all
            raise ValueError(f"{path}: {kind!r:.40} cannot be the name of a kind")
        if not isinstance(texts, list) or not texts or not all(_is_prompt(text) for text in texts):
            raise ValueError(
                f"{path}: kind {kind!r:.40} must be a list of non-empty texts in valid Unicode"
            )
    return prompts


def first_of_each(prompts: Prompts, count: int | None) -> Prompts:
    """At most `count` prompts of each kind; all of them if it is None."""
    return {kind: texts[:count] for kind, texts in prompts.items()}


def _is_prompt(text: object) -> bool:
    if not isinstance(text, str) or not text.strip():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True
