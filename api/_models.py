# SPDX-License-Identifier: Apache-2.0
"""Encoded models: made, written and read."""

from __future__ import annotations

from pathlib import Path

from speq.hw.common.files import replacing
from speq.model import encoded_file
from speq.model.checkpoint import Model
from speq.model.encoded_file import EncodedModel, sha256
from speq.model.encoding import encode_linears, tensors_for
from speq.model.input_file import ENCODED_MODEL
from speq.model.number_format import FormatConfig


def encode(
    model: Model,
    config: FormatConfig | None = None,
    *,
    columns: int = 16,
) -> EncodedModel:
    """Encode all linear layers of a model, without calibration.

    No weight changes a bit. The command `speq encode` makes better drafts, with the help of
    calibration texts.

    Parameters
    ----------
    model : Model
    config : FormatConfig, optional
        Of all layers; groups of 64 weights and a split of 2 when not given.
    columns : int
        Columns of the array that the planes are laid out for. It matters to who reads the planes;
        sessions take any.

    Returns
    -------
    EncodedModel
        Its `tensors` are the layers by name.
    """
    tensors = encode_linears(model, config, columns=columns)
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    return EncodedModel(model.name, tensors, digests)


def read_encoded(path: str | Path, model: Model) -> EncodedModel:
    """Read a file that `write_encoded` or `speq encode` has written.

    Everything is compared: the digests of the file, and that it decodes to the model's weights.

    Parameters
    ----------
    path : str or Path
    model : Model
        That was encoded.

    Returns
    -------
    EncodedModel
        With the settings of speculation that the optimiser found best, if it made the file.

    Raises
    ------
    ValueError
        If the file is damaged, not an encoded model or one of another model.
    OSError
        If it is no regular file or cannot be read.
    """
    path = Path(path)
    encoded = encoded_file.read_encoded(path)
    tensors_for(model, encoded, path)
    return encoded


def write_encoded(path: str | Path, encoded: EncodedModel, *, force: bool = False) -> None:
    """Write an encoded model to one safetensors file, which appears complete or not at all.

    Parameters
    ----------
    path : str or Path
    encoded : EncodedModel
    force : bool
        Replace a file that is not an encoded model.

    Raises
    ------
    OSError
        If it cannot be written, or another file is in the way.
    """
    with replacing(Path(path), ENCODED_MODEL, force=force) as temporary:
        encoded_file.write_encoded(temporary, encoded)
