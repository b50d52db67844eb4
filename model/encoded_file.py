# SPDX-License-Identifier: Apache-2.0
"""Encoded models as files: draft planes, residual planes and group bytes of all linear layers.

The file is a safetensors file. Each tensor NAME of the model becomes three arrays as they lie in
memory (see speq.model.format for the layout):

    NAME.draft      uint16 [tiles, words, columns]
    NAME.residual   uint16 [tiles, words, columns]
    NAME.groups     uint8  [tiles, groups, columns]

and the entry `speq` of the file's metadata is a JSON object:

    version   5
    source    the model: an alias, or the checkpoint's path from the file's folder
    columns   columns of a tile
    tensors   for each NAME its `shape` [O, K], `format` (group and split), `drafted_outputs` if not
              all are drafted, the `sha256` of its FP16 weights, row by row, and `planes`, that of
              its arrays, one behind the other in the order above; both of little-endian numbers
    settings  "chain" and "alternates": the settings of speculation that were best on the
              calibration texts, without and with alternates; absent if there was none
    report    what the optimiser found, for people; absent if there was no calibration
    sha256    of this object as JSON in one line, without this entry

So no bit of a file changes unnoticed. `read_encoded` compares the digests of the header and of the
arrays; whether these are the weights of a model, `EncodedModel.check_source` and `check_bits` say.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from speq.model.checkpoint import Model, linear_names
from speq.model.format import EncodedTensor
from speq.model.input_file import check_regular
from speq.model.number_format import FormatConfig
from speq.model.settings import Policy, Settings

VERSION = 5

_MAX_HEADER = 1 << 24  # bytes; 200 of a tensor
_PLANES = ("draft", "residual", "groups")


@dataclass(frozen=True, eq=False)
class EncodedModel:
    """The contents of a file.

    Attributes
    ----------
    source : the model, an alias or a path from the file's folder
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
        planes = (tensor.draft_plane, tensor.residual_plane, tensor.group_bytes)
        present = dict(zip(_PLANES, planes, strict=True))
        entries[name] = {
            "shape": list(tensor.shape),
            "format": asdict(tensor.config),
            "drafted_outputs": tensor.drafted_outputs,
            "sha256": encoded.digests[name],
            "planes": _digest(present.values()),
        }
        arrays |= {f"{name}.{part}": array for part, array in present.items()}
    header = {
        "version": VERSION,
        "source": encoded.source,
        "columns": next(iter(encoded.tensors.values())).columns,
        "tensors": entries,
        "settings": {name: asdict(settings) for name, settings in encoded.settings.items()},
        "report": encoded.report,
    }
    header["sha256"] = _text_digest(header)
    try:
        save_file(arrays, path, {"speq": json.dumps(header)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_encoded(path: Path) -> EncodedModel:
    """Read a file, and compare the digests of its header and of every tensor's arrays.

    Raises
    ------
    ValueError
        If the file is not of this module's making or is damaged.
    OSError
        If it is no regular file or cannot be read.
    """
    check_regular(path)
    with _naming(path), safe_open(path, "numpy") as file:
        header = _header(file.metadata() or {})
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
            _settings(header["settings"]),
            header["report"],
        )


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata["speq"]
    if len(text) > _MAX_HEADER:
        raise ValueError(f"its header is longer than {_MAX_HEADER} characters")
    header = json.loads(text)
    if header["version"] != VERSION:
        raise ValueError(
            f"version is {header['version']!r:.40}, expected {VERSION}: encode it again"
        )
    digest = header.pop("sha256")
    if _text_digest(header) != digest:
        raise ValueError("its header differs from its digest")
    return header


def _tensor(file: Any, name: str, entry: Mapping[str, Any], columns: int) -> EncodedTensor:
    sizes = [columns, *entry["shape"], entry["drafted_outputs"] or 0]
    if any(type(size) is not int for size in sizes):
        raise ValueError(f"sizes of {name} are {sizes!r:.80}; expected integers")
    arrays = [file.get_tensor(f"{name}.{part}") for part in _PLANES]
    if _digest(arrays) != entry["planes"]:
        raise ValueError(f"the arrays of {name} differ from their digest")
    return EncodedTensor(
        name,
        tuple(entry["shape"]),
        FormatConfig(**entry["format"]),
        columns,
        *arrays,
        drafted_outputs=entry["drafted_outputs"],
    )


def _settings(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Settings]:
    """Settings of speculation by name: both or none."""
    if set(entries) not in (set(), {"chain", "alternates"}):
        raise ValueError(f"settings are {list(entries)!r:.80}; expected chain and alternates")
    return {name: _settings_of(name, values) for name, values in entries.items()}


def _settings_of(name: str, values: Mapping[str, Any]) -> Settings:
    policy = values.get("policy")
    if not isinstance(policy, dict):
        raise ValueError(f"policy of the settings {name} is {policy!r:.40}")
    for kind, given in ((Settings, values), (Policy, policy)):
        if set(given) != {member.name for member in fields(kind)}:
            raise ValueError(f"the settings {name} have {', '.join(given):.80}")
    for key, value in values.items():
        whole = type(value) is int or (key == "draft_length" and value is None)
        number = key == "threshold" and type(value) is float and math.isfinite(value)
        if key != "policy" and not whole and not number:
            raise ValueError(f"{key} of the settings {name} is {value!r:.40}")
    return Settings(**{**values, "policy": Policy(**policy)})


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """Hex digest of little-endian arrays, one behind the other."""
    digest = hashlib.sha256()
    for array in arrays:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()


def _text_digest(header: Mapping[str, Any]) -> str:
    """Hex digest of a header as JSON, without its digest."""
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Report a file's damage as a ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} is no intact encoded model: {error} is missing") from error
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
