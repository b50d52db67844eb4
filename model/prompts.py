# SPDX-License-Identifier: Apache-2.0
"""The prompts of `speq eval`: what is evaluated, and what settings are chosen on.

`prompts.json` beside this file holds two sets, for models that follow a chat format and for models
that only continue text (story openings), each with prompts for evaluation and, apart from them, for
calibration. Within each, a *kind* of text maps to its prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

#: Kind of text -> prompts.
Prompts = dict[str, list[str]]

_SHIPPED = Path(__file__).with_name("prompts.json")


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
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or UTF-8
        raise ValueError(f"{path} is no JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a file of prompts") from error
    if not isinstance(prompts, dict) or not prompts:
        raise ValueError(f"{path} must hold an object that maps kinds to lists of prompts")
    for kind, texts in prompts.items():
        if not isinstance(texts, list) or not texts or not all(_is_prompt(text) for text in texts):
            raise ValueError(f"{path}: kind {kind!r:.40} must be a list of non-empty texts")
    return prompts


def first_of_each(prompts: Prompts, count: int | None) -> Prompts:
    """At most `count` prompts of each kind; all of them if it is None."""
    return {kind: texts[:count] for kind, texts in prompts.items()}


def _is_prompt(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())
