# SPDX-License-Identifier: Apache-2.0
"""The container format of GGUF files: metadata and tensors, with every size checked.

`gguf.GGUFReader` cannot be given untrusted files: it believes every count, and makes several
objects per metadata element (an 8 MB file can take 1.6 GB, the real header of SmolLM2 two seconds).
So the header is walked here, in memory proportional to its length, with the package's tables of
types and block sizes; the tests compare the result with GGUFReader's. Reference: GGUF
specification, versions 2 and 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from speq.model.checkpoint import CheckpointError
from speq.model.input_file import check_regular

_TYPE = gguf.GGUFValueType
_SCALARS = {
    _TYPE.UINT8: "<u1",
    _TYPE.INT8: "<i1",
    _TYPE.UINT16: "<u2",
    _TYPE.INT16: "<i2",
    _TYPE.UINT32: "<u4",
    _TYPE.INT32: "<i4",
    _TYPE.FLOAT32: "<f4",
    _TYPE.BOOL: "?",
    _TYPE.UINT64: "<u8",
    _TYPE.INT64: "<i8",
    _TYPE.FLOAT64: "<f8",
}
_VERSIONS = (2, 3)
_MAX_RANK = 4
_MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor: `data` is uint8 [..., bytes of a row], `shape` counts weights, K last."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The weights, float32 of shape `shape`. Raises CheckpointError for an unsupported type."""
        try:
            # A damaged file's infinite scales make NaNs, which weights may be.
            with np.errstate(all="ignore"):
                values = gguf.dequantize(self.data, self.kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"tensor {self.name!r}: type {self.kind.name} is not supported"
            ) from error
        return np.array(values, dtype=np.float32).reshape(self.shape)

    def part(self, rows: slice) -> "GgufTensor":
        """Some rows of a matrix."""
        data = self.data[rows]
        return replace(self, shape=(len(data), *self.shape[1:]), data=data)


@dataclass(frozen=True)
class Metadata:
    """Typed access to the metadata fields of a GGUF file."""

    fields: dict[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.fields.get(key, default)
        if value is None:
            raise CheckpointError(f"metadata field {key!r} is missing")
        if type(value) is not kind:
            raise CheckpointError(f"metadata field {key!r} has the wrong type")
        return value

    def strings(self, key: str) -> list[str]:
        return self.get(key, list)

    def numbers(self, key: str) -> list:
        return self.get(key, np.ndarray).tolist()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata (int, float, bool, str, list of str, numpy array) and tensors of a GGUF file.

    Tensors are views of the mapped file. Raises CheckpointError if anything does not lie inside the
    file, overlaps or has an unknown type; OSError if it is no regular file or cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        magic, version, tensor_count, value_count = reader.unpack("<4sIQQ")
        if magic != b"GGUF":
            raise CheckpointError("not a GGUF file")
        if int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS:
            raise CheckpointError(
                "a big-endian GGUF file is not supported: convert it with the gguf package's "
                "gguf-convert-endian"
            )
        if version not in _VERSIONS:
            raise CheckpointError(f"GGUF version {version} is not supported, only 2 and 3")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = reader.string()
            if key in metadata:
                raise CheckpointError(f"metadata field {key!r:.80} is there twice")
            metadata[key] = reader.value(reader.kind())
        infos = [reader.tensor_info() for _ in range(tensor_count)]
        header_end = file.tell()
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
        raise CheckpointError("general.alignment is not a small positive number")
    start = -(-header_end // alignment) * alignment
    return metadata, _map_tensors(path, start, infos)


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    row_bytes: int
    offset: int

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.row_bytes)


def _map_tensors(path: Path, start: int, infos: list[_TensorInfo]) -> dict[str, GgufTensor]:
    """Views of the tensors, whose offsets count from `start`; no byte may be in two of them."""
    mapped = np.memmap(path, np.uint8, mode="r")
    tensors = {}
    end = start
    for info in sorted(infos, key=lambda info: info.offset):
        first, length = start + info.offset, math.prod(info.data_shape)
        if first < end or info.name in tensors:
            raise CheckpointError(f"tensor {info.name!r:.80} is there twice or overlaps another")
        end = first + length
        if end > len(mapped):
            raise CheckpointError(f"truncated: tensor {info.name!r:.80} ends beyond the file")
        data = np.asarray(mapped)[first:end].reshape(info.data_shape)
        tensors[info.name] = GgufTensor(info.name, info.kind, info.shape, data)
    return tensors


class _Reader:
    """Reads the header's primitives; raises CheckpointError where the file ends too early."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def take(self, count: int) -> bytes:
        # Compared first: a read would allocate what a damaged length asks for.
        if count > self._size - self._file.tell():
            raise CheckpointError("truncated GGUF header")
        return self._file.read(count)

    def unpack(self, layout: str) -> tuple:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError("a string of the GGUF header is not UTF-8") from error

    def kind(self) -> gguf.GGUFValueType:
        (number,) = self.unpack("<I")
        try:
            return _TYPE(number)
        except ValueError as error:
            raise CheckpointError(f"GGUF header has an unknown value type {number}") from error

    def value(self, kind: gguf.GGUFValueType) -> Any:
        if kind == _TYPE.STRING:
            return self.string()
        if kind != _TYPE.ARRAY:
            return self.array(kind, 1).item()
        element = self.kind()
        (count,) = self.unpack("<Q")
        if element == _TYPE.STRING:
            return [self.string() for _ in range(count)]
        return self.array(element, count)

    def array(self, kind: gguf.GGUFValueType, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise CheckpointError("arrays of arrays are not supported in a GGUF header")
        dtype = np.dtype(_SCALARS[kind])
        data = np.frombuffer(self.take(count * dtype.itemsize), np.uint8)
        return data != 0 if kind == _TYPE.BOOL else data.view(dtype)

    def tensor_info(self) -> _TensorInfo:
        name = self.string()
        (rank,) = self.unpack("<I")
        if not 1 <= rank <= _MAX_RANK:
            raise CheckpointError(f"tensor {name!r:.80} has {rank} dimensions")
        shape = self.unpack(f"<{rank}Q")[::-1]  # the file lists the fastest dimension first
        number, offset = self.unpack("<IQ")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"tensor {name!r:.80} has unknown type {number}") from error
        if shape[-1] % block or 0 in shape:
            raise CheckpointError(f"tensor {name!r:.80}: rows are not whole blocks of {block}")
        return _TensorInfo(name, kind, shape, shape[-1] // block * block_bytes, offset)
