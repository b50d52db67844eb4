# SPDX-License-Identifier: Apache-2.0
"""`speq encode`: a model's linear layers as one file of draft planes, residual planes, group bytes.

The file is a safetensors file. Each tensor NAME of the model becomes three arrays as they lie in
memory (see speq.model.format for the layout):

    NAME.draft      uint16 [tiles, words, columns]
    NAME.residual   uint16 [tiles, words, columns]
    NAME.groups     uint8  [tiles, groups, columns]

and the entry `speq` of the file's metadata is a JSON object:

    version   1
    source    the model's name, as given
    format    group, split and width
    columns   columns of a tile
    tensors   for each NAME its `shape` [O, K] and the `sha256` of its FP16 weights, row by row,
              little-endian
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from speq.model.checkpoint import Model, linear_names, load_model
from speq.model.format import EncodedTensor, FormatConfig
from speq.model.format import encode as encode_tensor

VERSION = 1


def sha256(weights: torch.Tensor) -> str:
    """Hex digest of the bits of a tensor, torch.float16, row by row."""
    return hashlib.sha256(weights.contiguous().numpy().astype("<f2", copy=False)).hexdigest()


def block_linears(model: Model, pattern: str = "") -> dict[str, torch.Tensor]:
    """The weights of the linear layers of all blocks, those whose name `pattern` finds.

    Returns torch.float16 [O, K] by name.

    Raises
    ------
    ValueError
        If the pattern is not a regular expression or finds no name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    names = [name for name in linear_names(model.config) if name.startswith("block.")]
    found = {name: model.linear_weight(name) for name in names if expression.search(name)}
    if not found:
        raise ValueError(f"{pattern!r} finds none of the tensors {names[0]} to {names[-1]}")
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end; removed on any failure.

    Raises
    ------
    OSError
        At once if `path` is a folder or its folder cannot be written to.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent)) from error
    try:
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors replaces the file by one that only its owner may read.
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_encoded(
    path: Path, source: str, encoded: dict[str, EncodedTensor], digests: dict[str, str]
) -> None:
    """Write encoded tensors, all of one configuration, to a file as this module describes it.

    Parameters
    ----------
    path : Path
    source : str
        The model's name.
    encoded : tensors by name, at least one
    digests : SHA-256 of the original weights by name

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    first = next(iter(encoded.values()))
    header = {
        "version": VERSION,
        "source": source,
        "format": asdict(first.config),
        "columns": first.columns,
        "tensors": {
            name: {"shape": list(tensor.shape), "sha256": digests[name]}
            for name, tensor in encoded.items()
        },
    }
    arrays = {}
    for name, tensor in encoded.items():
        arrays[f"{name}.draft"] = tensor.draft_plane
        arrays[f"{name}.residual"] = tensor.residual_plane
        arrays[f"{name}.groups"] = tensor.group_bytes
    try:
        save_file(arrays, path, {"speq": json.dumps(header)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_encoded(path: Path) -> tuple[dict[str, Any], Iterator[EncodedTensor]]:
    """The header of an encoded file, and its tensors, each read when it is its turn.

    Raises
    ------
    ValueError
        If the file is not of this module's making or is damaged; the iterator, too.
    OSError
        If it cannot be read.
    """
    with _naming(path), safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["speq"])
        if header["version"] != VERSION:
            raise ValueError(f"version is {header['version']!r}, expected {VERSION}")
    return header, _read_tensors(path, header)


def _read_tensors(path: Path, header: dict[str, Any]) -> Iterator[EncodedTensor]:
    with _naming(path), safe_open(path, "numpy") as file:
        config = FormatConfig(**header["format"])
        for name, entry in header["tensors"].items():
            planes = [file.get_tensor(f"{name}.{part}") for part in ("draft", "residual", "groups")]
            yield EncodedTensor(name, tuple(entry["shape"]), config, header["columns"], *planes)


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
    ) as error:
        raise ValueError(f"{path} is no intact encoded model: {error}") from error


def check_encoded(path: Path) -> int:
    """Decode a file and compare every tensor with the digest of its original weights.

    Returns the number of tensors.

    Raises
    ------
    ValueError
        If the file is damaged or a tensor differs, with the name of the first that does.
    OSError
        If the file cannot be read.
    """
    header, tensors = read_encoded(path)
    for tensor in tensors:
        if sha256(tensor.decode()) != header["tensors"][tensor.name]["sha256"]:
            raise ValueError(f"{path}: {tensor.name} does not decode to its original bits")
    return len(header["tensors"])


def _encode_all(
    weights: dict[str, torch.Tensor], config: FormatConfig, columns: int
) -> tuple[dict[str, EncodedTensor], float]:
    """Encoded tensors by name and the seconds that encoding took, with a progress bar."""
    encoded, seconds = {}, 0.0
    shown = (
        TextColumn("encoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*shown, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(weights))
        for name, weight in weights.items():
            progress.update(task, description=name)
            start = time.perf_counter()
            encoded[name] = encode_tensor(weight, config, name=name, columns=columns)
            seconds += time.perf_counter() - start
            progress.advance(task)
        progress.update(task, description="")
    return encoded, seconds


def run(
    model_name: str,
    output: Path,
    group: int,
    split: int,
    width: int,
    columns: int,
    pattern: str,
    verify: bool,
) -> None:
    """Encode a model to `output` and print storage, time and, with `verify`, the comparison.

    `output` appears only when it is complete and, with `verify`, found right.

    Raises
    ------
    ValueError
        If a parameter, the model (CheckpointError) or the comparison is wrong.
    OSError
        If a file cannot be read or written.
    """
    config = FormatConfig(group=group, split=split, width=width)
    with replacing(output) as temporary:
        with Console(stderr=True).status(f"loading {model_name}"):
            model = load_model(model_name)
        weights = block_linears(model, pattern)
        encoded, seconds = _encode_all(weights, config, columns)
        digests = {name: sha256(weight) for name, weight in weights.items()}
        write_encoded(temporary, model.name, encoded, digests)
        if verify:
            count = check_encoded(temporary)
            print(f"verified: {count} of {len(weights)} tensors decode to their original bits")

    total = sum(weight.numel() for weight in weights.values())
    stored = sum(tensor.storage_bits() for tensor in encoded.values())
    drafted = sum(8 * (t.draft_plane.nbytes + t.group_bytes.nbytes) for t in encoded.values())
    print(f"weights:  {total / 1e6:.2f} M in {len(weights)} tensors of {model.name}")
    print(
        f"storage:  {stored / total:.4f} bits per weight, {stored / total / 16 - 1:.2%} over FP16"
    )
    print(f"draft:    {drafted / total:.4f} bits per weight read in a draft pass")
    print(f"encoding: {seconds:.2f} s, {total / 1e6 / seconds:.1f} M weights/s")
    print(f"written:  {output}, {output.stat().st_size / 1e6:.1f} MB")
