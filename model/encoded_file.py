# SPDX-License-Identifier: Apache-2.0
"""Encoded models as files: draft planes, residual planes and group bytes of all linear layers.

The file is a safetensors file. Each tensor NAME of the model becomes three arrays as they lie in
memory (see speq.model.format for the layout), and two more if its input channels are permuted or
scaled:

    NAME.draft      uint16 [tiles, words, columns]
    NAME.residual   uint16 [tiles, words, columns]
    NAME.groups     uint8  [tiles, groups, columns]
    NAME.order      uint16 [K]
    NAME.shift      uint8  [K]

and the entry `speq` of the file's metadata is a JSON object:

    version   3
    source    the model's name, as given
    columns   columns of a tile
    tensors   for each NAME its `shape` [O, K], `format` (group, split and width),
              `drafted_outputs` if not all are drafted, `channels` (which of order and shift there
              are) and the `sha256` of its FP16 weights, row by row, little-endian
    settings  "chain" and "alternates": the settings of speculation that were best on the
              calibration texts, without and with leaf alternates; absent if there was none
    report    what the optimiser found, for people; absent if there was no calibration
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from speq.model.checkpoint import Model, linear_names
from speq.model.format import EncodedTensor
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings

VERSION = 3


@dataclass(frozen=True, eq=False)
class EncodedModel:
    """The contents of a file.

    Attributes
    ----------
    source : the model's name
    tensors : encoded linear layers by name, at least one
    digests : SHA-256 of the original weights by name
    settings : "chain" and "alternates" -> Settings, or nothing
    report : what the optimiser found, JSON values
    """

    source: str
    tensors: Mapping[str, EncodedTensor] = field(repr=False)
    digests: Mapping[str, str] = field(repr=False)
    settings: Mapping[str, Settings] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def check_source(self, model: Model) -> None:
        """Raises ValueError, naming the tensor, unless these are linear layers of the model."""
        names = set(linear_names(model.config))
        for name, digest in self.digests.items():
            if name not in names or sha256(model.linear_weight(name)) != digest:
                raise ValueError(f"it is not of {model.name}: {name} differs")

    def check_bits(self) -> None:
        """Raises ValueError, naming the tensor, unless all decode to their original bits."""
        for name, tensor in self.tensors.items():
            if sha256(tensor.decode()) != self.digests[name]:
                raise ValueError(f"{name} does not decode to its original bits")


def sha256(weights: torch.Tensor) -> str:
    """Hex digest of the bits of a tensor, torch.float16, row by row."""
    return hashlib.sha256(weights.contiguous().numpy().astype("<f2", copy=False).data).hexdigest()


def write_encoded(path: Path, encoded: EncodedModel) -> None:
    """Write a file as this module describes it. Raises OSError if it cannot be written."""
    entries, arrays = {}, {}
    for name, tensor in encoded.tensors.items():
        channels = {"order": tensor.order, "shift": tensor.shift}
        present = {part: array for part, array in channels.items() if array is not None}
        entries[name] = {
            "shape": list(tensor.shape),
            "format": asdict(tensor.config),
            "drafted_outputs": tensor.drafted_outputs,
            "channels": list(present),
            "sha256": encoded.digests[name],
        }
        arrays[f"{name}.draft"] = tensor.draft_plane
        arrays[f"{name}.residual"] = tensor.residual_plane
        arrays[f"{name}.groups"] = tensor.group_bytes
        arrays |= {f"{name}.{part}": array for part, array in present.items()}
    header = {
        "version": VERSION,
        "source": encoded.source,
        "columns": next(iter(encoded.tensors.values())).columns,
        "tensors": entries,
        "settings": {name: asdict(settings) for name, settings in encoded.settings.items()},
        "report": encoded.report,
    }
    try:
        save_file(arrays, path, {"speq": json.dumps(header)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_encoded(path: Path) -> EncodedModel:
    """Read a file.

    Raises
    ------
    ValueError
        If the file is not of this module's making or is damaged.
    OSError
        If it cannot be read.
    """
    if path.is_dir():  # the library's own error does not name it
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _naming(path), safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["speq"])
        if header["version"] != VERSION:
            raise ValueError(
                f"version is {header['version']!r:.40}, expected {VERSION}: encode it again"
            )
        tensors = {
            name: _tensor(file, name, entry, header["columns"])
            for name, entry in header["tensors"].items()
        }
        if not tensors or not isinstance(header["source"], str):
            raise ValueError("it holds no tensors or names no model")
        return EncodedModel(
            header["source"],
            tensors,
            {name: entry["sha256"] for name, entry in header["tensors"].items()},
            {name: Settings(**entry) for name, entry in header["settings"].items()},
            header["report"],
        )


def _tensor(file: Any, name: str, entry: Mapping[str, Any], columns: int) -> EncodedTensor:
    sizes = [columns, *entry["shape"], entry["drafted_outputs"] or 0]
    if any(type(size) is not int for size in sizes):
        raise ValueError(f"sizes of {name} are {sizes!r:.80}; expected integers")
    planes = [file.get_tensor(f"{name}.{part}") for part in ("draft", "residual", "groups")]
    channels = {part: file.get_tensor(f"{name}.{part}") for part in entry["channels"]}
    config = FormatConfig(**entry["format"])
    return EncodedTensor(
        name, tuple(entry["shape"]), config, columns, *planes,
        drafted_outputs=entry["drafted_outputs"], **channels,
    )  # fmt: skip


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Report a file's damage as a ValueError that names the file."""
    try:
        yield
    # What a header of the wrong structure can cause, and what EncodedTensor says about its planes.
    except (
        SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path} is no intact encoded model: {error}") from error
