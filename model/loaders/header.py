# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of itself, read without its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from speq.model.checkpoint import CheckpointError, ModelConfig, Place, expect_all_read, expect_shape
from speq.model.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its shape, K last, and the name of its type."""

    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True, eq=False)
class Header:
    """The headers of a checkpoint.

    Attributes
    ----------
    container : str
        "Hugging Face folder", "GGUF file" or "llama2.c file".
    architecture : str
        As the checkpoint calls it.
    config : ModelConfig or None
        None if its settings are not supported.
    problems : list of str
        All that is known to keep it from being loaded: settings, tensors, tokenizer.
    sizes : dict
        Of the members of `ModelConfig` that are sizes those that the checkpoint names.
    tensors : dict
        All that are stored, by the file's names.
    bytes : int
        Of the files with weights.
    tokenizer : Tokenizer or None
        None if it cannot be read.
    """

    container: str
    architecture: str
    config: ModelConfig | None
    problems: list[str]
    sizes: Mapping[str, int]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    bytes: int
    tokenizer: Tokenizer | None = field(repr=False)


def attempt(problems: list[str], function: Callable[..., T], *arguments: Any) -> T | None:
    """What the function returns; None if it raises CheckpointError or OSError, whose message joins
    the problems."""
    try:
        return function(*arguments)
    except CheckpointError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}" if error.strerror else str(error))
    return None


def whole_numbers(values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, int]:
    """Of sizes by name and their key those that are there and are whole numbers."""
    return {name: values[key] for name, key in keys.items() if type(values.get(key)) is int}


def stored_problems(
    where: Mapping[str, Place],
    tensors: Mapping[str, StoredTensor],
    unused: Iterable[str],
    supports: Callable[[str, str], None],
) -> list[str]:
    """What keeps stored tensors from being read as the weights of a model, a line for each kind of
    problem. `supports(name, kind)` raises CheckpointError if that type cannot be read."""
    needed = {place.tensor: place.shape for place in where.values()}
    missing = [name for name in needed if name not in tensors]
    wrong: list[str] = []
    for name, shape in needed.items():
        if name in tensors:
            attempt(wrong, supports, name, tensors[name].kind)
            attempt(wrong, expect_shape, name, tensors[name].shape, shape)
    found = [f"tensor {missing[0]!r} is missing{_others(missing)}"] if missing else []
    found += [f"{wrong[0]}{_others(wrong)}"] if wrong else []
    attempt(found, expect_all_read, tensors, [*needed, *unused])
    return found


def _others(problems: list[str]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
