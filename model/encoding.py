# SPDX-License-Identifier: Apache-2.0
"""All linear layers of a model, encoded here or taken from an encoded file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from speq.model.checkpoint import Model, linear_names
from speq.model.encoded_file import EncodedModel
from speq.model.format import EncodedTensor, encode
from speq.model.number_format import FormatConfig

#: Passes names on one by one, for example to show progress.
Track = Callable[[Iterable[str]], Iterable[str]]


def linear_weights(model: Model, pattern: str = "") -> dict[str, torch.Tensor]:
    """The weights of the linear layers whose name `pattern` finds, torch.float16 [O, K] by name.

    Raises
    ------
    ValueError
        If the pattern is not a regular expression or finds no name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    names = linear_names(model.config)
    found = {name: model.linear_weight(name) for name in names if expression.search(name)}
    if not found:
        raise ValueError(f"{pattern!r} finds none of the tensors {names[0]} to {names[-1]}")
    return found


def encode_linears(
    model: Model,
    config: FormatConfig | None = None,
    *,
    pattern: str = "",
    columns: int = 16,
    track: Track = iter,
) -> dict[str, EncodedTensor]:
    """Encode linear layers, with scale codes fitted to the weights alone.

    Parameters
    ----------
    model : Model
    config : FormatConfig, optional
        Of all layers.
    pattern : str
        As of `linear_weights`; all layers when not given.
    columns : int
        Columns of the array that the planes are laid out for.
    track : callable
        Gets the names, and is asked for the next one when a layer is encoded.

    Returns
    -------
    dict
        Encoded layers by name.

    Raises
    ------
    ValueError
        If the pattern is none or finds no name.
    """
    config = config or FormatConfig()
    weights = linear_weights(model, pattern)
    return {
        name: encode(weights[name], config, name=name, columns=columns) for name in track(weights)
    }


def tensors_for(
    model: Model, file: EncodedModel, path: Path, *, decode: bool = True
) -> Mapping[str, EncodedTensor]:
    """The tensors of an encoded file at `path`, which must be this model's and decode to its bits.

    Without `decode` the latter is left to whoever uses them, as a `Session` with a board does.
    Raises ValueError, naming the file and the tensor, if they are not or do not.
    """
    try:
        file.check_source(model)
        if decode:
            file.check_bits()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return file.tensors
