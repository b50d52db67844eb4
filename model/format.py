# SPDX-License-Identifier: Apache-2.0
"""Tensors in the number format: encoding, decoding and their layout in memory.

The format itself is described in `speq.model.number_format`.

Memory layout
-------------
O is cut into tiles of `columns` output rows (the array's width C) and K is padded to a multiple of
4. All bits of the padding are zero, in the planes and the group bytes. That is a finite draft
weight, but not the weight zero: activations of a padded k must be zero, padded outputs are dropped.
Each plane is a C-contiguous array whose innermost axis is the column, so that one row of it is what
the array's C columns consume together; words are little-endian.

draft plane, uint16 [tiles, words, columns]
    Word i of a column holds the draft codes of weights 4i .. 4i+3, the first in the low bits.
residual plane, uint16 [tiles, words, columns]
    The residuals of a column's weights as one little-endian bit stream, cut into 16-bit words:
    3 words per 4 weights. It restarts at each tile.
group bytes, uint8 [tiles, groups, columns]
    Base exponent in bits 4..0, scale code of the draft levels in bits 7..5.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from speq.model.number_format import (
    BASE_BITS,
    NIBBLES_PER_WORD,
    NONFINITE_BASE,
    RESIDUAL_BITS,
    SCALE_DENOMINATOR,
    SCALE_NUMERATORS,
    FormatConfig,
    draft_levels,
    draft_words,
    remap_table,
    residual_words,
    smallest_owned,
)

# Weights are processed in blocks of about this many, small enough for the caches.
_BLOCK_WEIGHTS = 1 << 18


_RESIDUAL_MASK = np.uint16((1 << RESIDUAL_BITS) - 1)


@cache
def _code_tables(config: FormatConfig) -> tuple[np.ndarray, np.ndarray]:
    """Lookup tables between FP16 patterns and stored words, 8 bits at a time.

    Returns (encode, decode), uint16 [32, 256], indexed by base exponent and by bits 14..7 of the
    FP16 pattern (encode) or of the stored word (decode); they give the other's bits 14..7 in
    place. Bits 15 and 6..0 are the same in both.
    """
    table = np.array(remap_table(config.split))
    base, upper = np.meshgrid(np.arange(32), np.arange(256), indexing="ij")
    exponent, m9, low = upper >> 3, upper >> 2 & 1, upper & 3
    stored = table[((base - exponent) & 31) << 1 | m9] << 2 | low
    encode = (stored << 7).astype(np.uint16)
    decode = np.zeros_like(encode)
    decode[base, stored] = upper << 7
    return encode, decode


def _translate(patterns: np.ndarray, base: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map uint16 patterns [..., group] with base exponents [...] through a code table."""
    index = (patterns >> 7) & np.uint16(0xFF)
    index |= (base.astype(np.uint16) << 8)[..., None]
    out = table.reshape(-1).take(index)
    out |= patterns & np.uint16(0x807F)
    return out


def _swap_zeros(patterns: np.ndarray, base: np.ndarray, split: int) -> np.ndarray:
    """Patterns [..., group] with zeros and the power of two 2^(base - 15 - smallest_owned) swapped,
    sign by sign, where base [...] is larger than that."""
    exponent = base.astype(np.int16) - smallest_owned(split)
    power = (np.maximum(exponent, 0).astype(np.uint16) << np.uint16(10))[..., None]
    magnitude = patterns & np.uint16(0x7FFF)
    swapped = (magnitude == 0) | (magnitude == power)
    return np.bitwise_xor(patterns, power, out=patterns.copy(), where=swapped)


def _store(patterns: np.ndarray, base: np.ndarray, config: FormatConfig) -> np.ndarray:
    """Stored words of patterns uint16 [..., group] with base exponents [...]."""
    patterns = _swap_zeros(patterns, base, config.split)
    return _translate(patterns, base, _code_tables(config)[0])


def _restore(words: np.ndarray, base: np.ndarray, config: FormatConfig) -> np.ndarray:
    """The inverse of `_store`."""
    patterns = _translate(words, base, _code_tables(config)[1])
    return _swap_zeros(patterns, base, config.split)


def remap(patterns: np.ndarray, base: np.ndarray, config: FormatConfig) -> np.ndarray:
    """Stored words of FP16 bit patterns, elementwise.

    Parameters
    ----------
    patterns : uint16 array [...]
        FP16 bit patterns; all 65,536 are allowed.
    base : integer array, broadcastable to [...]
        Base exponents, 0 to 31.
    config : FormatConfig

    Returns
    -------
    uint16 array [...]
    """
    base = np.broadcast_to(base, patterns.shape)
    return _store(patterns[..., None], base, config)[..., 0]


def unmap(words: np.ndarray, base: np.ndarray, config: FormatConfig) -> np.ndarray:
    """FP16 bit patterns of stored words, elementwise: the inverse of `remap`."""
    base = np.broadcast_to(base, words.shape)
    return _restore(words[..., None], base, config)[..., 0]


@cache
def _signed_levels(config: FormatConfig) -> np.ndarray:
    """Draft values by draft code in units of the level unit, float32 [16]."""
    magnitudes = np.array([level.value for level in draft_levels(config)], np.float32)
    return np.concatenate([magnitudes, -magnitudes])


@cache
def _group_scales(config: FormatConfig) -> np.ndarray:
    """Value of one level unit by group byte, float32 [256]; NaN where b marks inf or NaN."""
    byte = np.arange(256)
    base, code = byte & 31, byte >> BASE_BITS
    scale = np.array(SCALE_NUMERATORS)[code] / SCALE_DENOMINATOR
    unit = np.ldexp(scale, base - 15 + config.level_unit_exponent)
    return np.where(base == NONFINITE_BASE, np.nan, unit).astype(np.float32)


def _parallel_blocks(rows: int, columns: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) on blocks of rows, in as many threads as there are cores."""
    step = max(1, _BLOCK_WEIGHTS // max(1, columns))
    starts = range(0, rows, step)
    if len(starts) == 1:  # a thread would cost more than the work
        work(0, rows)
        return
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
        for done in [pool.submit(work, i, min(i + step, rows)) for i in starts]:
            done.result()


def _as_patterns(weights: torch.Tensor, name: str) -> np.ndarray:
    """FP16 bit patterns, uint16 [O, K], of a checked weight tensor."""
    if not isinstance(weights, torch.Tensor) or weights.dtype != torch.float16:
        kind = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"weights of {name!r} are {kind}; expected a torch.float16 tensor")
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(
            f"weights of {name!r} have shape {tuple(weights.shape)}; expected [O, K], both >= 1"
        )
    return weights.detach().contiguous().cpu().numpy().view(np.uint16)


def _grouped(patterns: np.ndarray, group: int) -> np.ndarray:
    """Zero-pad [rows, K] along K and view it as [rows, groups, group]."""
    rows, k = patterns.shape
    groups = -(-k // group)
    if k % group:
        patterns = np.pad(patterns, ((0, 0), (0, groups * group - k)))
    return patterns.reshape(rows, groups, group)


def fit_scale_codes(
    weights: torch.Tensor,
    config: FormatConfig,
    importance: torch.Tensor | None = None,
    name: str = "tensor",
) -> np.ndarray:
    """Scale codes that minimise each group's draft error.

    The error of a group is the sum over k of importance[k] * (w - w_draft)^2.

    Parameters
    ----------
    weights : torch.float16 [O, K]
    config : FormatConfig
    importance : torch.float32 [K], optional
        Weight of input k's error, usually the mean of x_k^2 over calibration activations; all
        ones when it is not given.
    name : str
        The tensor's name, for error messages.

    Returns
    -------
    numpy.uint8 [O, ceil(K / group)]

    Raises
    ------
    TypeError, ValueError
        If dtype or shape of an argument is wrong.
    """
    patterns = _as_patterns(weights, name)
    rows, k = patterns.shape
    factor = None
    if importance is not None:
        if tuple(importance.shape) != (k,):
            raise ValueError(
                f"importance of {name!r} has shape {tuple(importance.shape)}; expected [{k}]"
            )
        factor = np.pad(importance.numpy().astype(np.float32), (0, -k % config.group))
        factor = factor.reshape(-1, config.group)
    codes = np.empty((rows, -(-k // config.group)), np.uint8)

    def fit(start: int, stop: int) -> None:
        grouped = _grouped(patterns[start:stop], config.group)
        codes[start:stop] = _fit_groups(grouped, k, config, factor)

    _parallel_blocks(rows, k, fit)
    return codes


def _fit_groups(
    grouped: np.ndarray, k: int, config: FormatConfig, factor: np.ndarray | None = None
) -> np.ndarray:
    """Scale codes, uint8 [rows, groups], of zero-padded FP16 patterns [rows, groups, group]."""
    base = _base_exponents(grouped)
    stored = _store(grouped, base, config)
    level = _signed_levels(config).take(stored >> RESIDUAL_BITS)
    level.reshape(len(level), -1)[:, k:] = 0  # padding is not an error to be minimised
    value = grouped.view(np.float16).astype(np.float32)
    weighted = level if factor is None else level * factor
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        correlation = np.einsum("rgk,rgk->rg", weighted, value)
        energy = np.einsum("rgk,rgk->rg", weighted, level)
        unit = np.ldexp(np.float32(1), base.astype(np.int32) - 15 + config.level_unit_exponent)
        scale = correlation / (energy * unit) * SCALE_DENOMINATOR
    # A group without finite, important weights keeps the scale 1. For the others the error is a
    # parabola in the scale, so the scale code nearest to its vertex is the best one.
    scale = np.nan_to_num(scale, nan=SCALE_DENOMINATOR)
    midpoints = np.convolve(SCALE_NUMERATORS, (0.5, 0.5), "valid").astype(np.float32)
    return np.searchsorted(midpoints, scale).astype(np.uint8)


def _base_exponents(grouped: np.ndarray) -> np.ndarray:
    """Largest exponent field of each group, uint8 [rows, groups]."""
    magnitude = (grouped & np.uint16(0x7FFF)).max(axis=-1)
    return (magnitude >> 10).astype(np.uint8)


def pack_draft(codes: np.ndarray) -> np.ndarray:
    """Pack draft codes into 16-bit words, the draft plane of independent rows.

    Parameters
    ----------
    codes : uint16 array [rows, K], each below 16

    Returns
    -------
    uint16 array [rows, draft_words(K)]
    """
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % NIBBLES_PER_WORD)))
    nibbles = codes.reshape(len(codes), -1, NIBBLES_PER_WORD)
    plane = nibbles[..., 0].copy()
    for i in range(1, NIBBLES_PER_WORD):
        plane |= nibbles[..., i] << np.uint16(4 * i)
    return plane


def unpack_draft(plane: np.ndarray, k: int) -> np.ndarray:
    """Draft codes, uint16 [rows, K], of a packed plane: the inverse of `pack_draft`."""
    codes = np.empty((*plane.shape, NIBBLES_PER_WORD), np.uint16)
    for i in range(NIBBLES_PER_WORD):
        codes[..., i] = plane >> np.uint16(4 * i)
    codes &= np.uint16(15)
    return codes.reshape(len(plane), -1)[:, :k]


def pack_residual(residuals: np.ndarray) -> np.ndarray:
    """Pack residuals, uint16 [rows, K], into uint16 [rows, residual_words(K)]."""
    rows, k = residuals.shape
    padded = np.pad(residuals, ((0, 0), (0, -k % 4))) if k % 4 else residuals
    a, b, c, d = np.moveaxis(padded.reshape(rows, -1, 4), 2, 0)
    plane = np.empty((rows, a.shape[1], 3), np.uint16)
    plane[..., 0] = a | b << np.uint16(12)
    plane[..., 1] = b >> np.uint16(4) | c << np.uint16(8)
    plane[..., 2] = c >> np.uint16(8) | d << np.uint16(4)
    return plane.reshape(rows, -1)


def unpack_residual(plane: np.ndarray, k: int) -> np.ndarray:
    """Residuals, uint16 [rows, K], of a packed plane: the inverse of `pack_residual`."""
    low, middle, high = np.moveaxis(plane.reshape(len(plane), -1, 3), 2, 0)
    out = np.empty((*low.shape, 4), np.uint16)
    out[..., 0] = low
    out[..., 1] = low >> np.uint16(12) | middle << np.uint16(4)
    out[..., 2] = middle >> np.uint16(8) | high << np.uint16(8)
    out[..., 3] = high >> np.uint16(4)
    out &= _RESIDUAL_MASK
    return out.reshape(len(plane), -1)[:, :k]


@dataclass(frozen=True, eq=False)
class EncodedTensor:
    """A weight tensor as it lies in memory; see the module's documentation for the layout.

    Attributes
    ----------
    name : str
    shape : (O, K)
    config : FormatConfig
    columns : int
        Output rows in a tile.
    draft_plane, residual_plane : numpy.uint16 [tiles, words, columns]
    group_bytes : numpy.uint8 [tiles, groups, columns]
    drafted_outputs : int, optional
        Draft passes compute only the first so many outputs (of a large vocabulary, say), and read
        only their tiles; all when not given.
    """

    name: str
    shape: tuple[int, int]
    config: FormatConfig
    columns: int
    draft_plane: np.ndarray = field(repr=False)
    residual_plane: np.ndarray = field(repr=False)
    group_bytes: np.ndarray = field(repr=False)
    drafted_outputs: int | None = None

    def __post_init__(self) -> None:
        o, k = self.shape
        if self.drafted_outputs is not None and not 1 <= self.drafted_outputs <= o:
            raise ValueError(
                f"drafted_outputs of {self.name!r} is {self.drafted_outputs}; expected 1..{o}"
            )
        tiles = -(-o // self.columns)
        expected = {
            "draft_plane": (np.uint16, draft_words(k)),
            "residual_plane": (np.uint16, residual_words(k)),
            "group_bytes": (np.uint8, -(-k // self.config.group)),
        }
        for plane, (dtype, words) in expected.items():
            array = getattr(self, plane)
            if array.dtype != dtype or array.shape != (tiles, words, self.columns):
                raise ValueError(
                    f"{plane} of {self.name!r} is {array.dtype} {array.shape}; expected "
                    f"{np.dtype(dtype)} {(tiles, words, self.columns)}"
                )

    def decode(self) -> torch.Tensor:
        """The original weights, torch.float16 [O, K], bit for bit."""
        out = np.empty((self._padded_rows, self.shape[1]), np.uint16)

        def work(start: int, stop: int) -> None:
            tiles = slice(start // self.columns, stop // self.columns)
            words = self._stored_words(tiles)
            grouped = _grouped(words, self.config.group)
            base = _untile(self.group_bytes[tiles]) & np.uint8(31)
            patterns = _restore(grouped, base, self.config)
            out[start:stop] = patterns.reshape(len(words), -1)[:, : self.shape[1]]

        self._for_tiles(work)
        return torch.from_numpy(out.view(np.float16)[: self.shape[0]])

    def draft(self) -> torch.Tensor:
        """The values that draft mode multiplies with, exact in torch.float32 [drafted_outputs, K].

        A group that holds an infinity or a NaN gives NaN for all its weights.
        """
        o, k = self.drafted_outputs or self.shape[0], self.shape[1]
        out = np.empty((self._padded_rows, k), np.float32)
        levels, scales = _signed_levels(self.config), _group_scales(self.config)

        def work(start: int, stop: int) -> None:
            tiles = slice(start // self.columns, stop // self.columns)
            codes = unpack_draft(_untile(self.draft_plane[tiles]), k)
            scale = scales.take(_untile(self.group_bytes[tiles]))
            scale = np.repeat(scale, self.config.group, axis=1)[:, :k]
            np.multiply(levels.take(codes), scale, out=out[start:stop])

        self._for_tiles(work)
        return torch.from_numpy(out[:o])

    def verify_words(self) -> np.ndarray:
        """The words that the array takes in verify mode, uint16 [tiles, K, columns].

        Bits 15..12 hold sign and q, bits 11..0 the rest of the stored word: both planes joined.
        """
        words = self._stored_words(slice(None))[:, : self.shape[1]]
        return _tile(words, self.columns)

    def storage_bits(self) -> int:
        """Bits in memory: both planes and group bytes, padding included."""
        planes = (self.draft_plane, self.residual_plane, self.group_bytes)
        return 8 * sum(plane.nbytes for plane in planes)

    def draft_bits(self) -> int:
        """Bits that a draft pass reads: of the tiles that it computes, draft plane and group
        bytes."""
        tiles = -(-(self.drafted_outputs or self.shape[0]) // self.columns)
        return 8 * (self.draft_plane[:tiles].nbytes + self.group_bytes[:tiles].nbytes)

    def _stored_words(self, tiles: slice) -> np.ndarray:
        """Stored words, uint16 [rows of the tiles, K]."""
        k = self.shape[1]
        codes = unpack_draft(_untile(self.draft_plane[tiles]), k)
        residuals = unpack_residual(_untile(self.residual_plane[tiles]), k)
        return codes << np.uint16(RESIDUAL_BITS) | residuals

    @property
    def _padded_rows(self) -> int:
        return len(self.group_bytes) * self.columns

    def _for_tiles(self, work: Callable[[int, int], None]) -> None:
        """Call work(first row, last row + 1) on blocks of whole tiles."""
        _parallel_blocks(
            len(self.group_bytes),
            self.columns * self.shape[1],
            lambda start, stop: work(start * self.columns, stop * self.columns),
        )


def _tile(rows: np.ndarray, columns: int) -> np.ndarray:
    """[tiles * columns, words] -> C-contiguous [tiles, words, columns]."""
    return np.ascontiguousarray(rows.reshape(-1, columns, rows.shape[1]).transpose(0, 2, 1))


def _untile(plane: np.ndarray) -> np.ndarray:
    """[tiles, words, columns] -> C-contiguous [tiles * columns, words]."""
    tiles, words, columns = plane.shape
    return np.ascontiguousarray(plane.transpose(0, 2, 1)).reshape(tiles * columns, words)


def _warn_nonfinite(patterns: np.ndarray, group_bytes: np.ndarray, group: int, name: str) -> None:
    """Warn with the name of the tensor and the first index if it holds infinities or NaNs."""
    rows = np.flatnonzero((group_bytes & 31 == NONFINITE_BASE).any(axis=1))
    if rows.size:
        column = int(np.argmax((patterns[rows[0]] & 0x7C00) == 0x7C00))
        warnings.warn(
            f"tensor {name!r} holds infinities or NaNs, the first at index "
            f"[{rows[0]}, {column}]: stored losslessly, but every dot product with them is NaN",
            RuntimeWarning,
            stacklevel=3,
        )


def encode(
    weights: torch.Tensor,
    config: FormatConfig,
    scale_codes: np.ndarray | torch.Tensor | None = None,
    name: str = "tensor",
    columns: int = 16,
    *,
    drafted_outputs: int | None = None,
) -> EncodedTensor:
    """Encode FP16 weights; `EncodedTensor.decode` gives the same bits back.

    Parameters
    ----------
    weights : torch.float16 [O, K]
    config : FormatConfig
    scale_codes : integers [O, ceil(K / group)], 0 to 7, optional
        Scale codes of the draft levels; `fit_scale_codes(weights, config)` when not given.
    name : str
        The tensor's name, for messages.
    columns : int
        Columns of the array that the planes are laid out for.
    drafted_outputs : int, optional
        As in `EncodedTensor`.

    Returns
    -------
    EncodedTensor

    Raises
    ------
    TypeError, ValueError
        If dtype, shape or range of an argument is wrong.

    Warns
    -----
    RuntimeWarning
        If there are infinities or NaNs, with the tensor's name and the first index.
    """
    patterns = _as_patterns(weights, name)
    o, k = patterns.shape
    if not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns is {columns!r}; expected an integer >= 1")
    tiles, groups = -(-o // columns), -(-k // config.group)
    codes = None if scale_codes is None else _check_scale_codes(scale_codes, (o, groups), name)

    draft = np.empty((tiles, draft_words(k), columns), np.uint16)
    residual = np.empty((tiles, residual_words(k), columns), np.uint16)
    group_bytes = np.empty((tiles, groups, columns), np.uint8)

    def work(start: int, stop: int) -> None:
        first, last = start * columns, min(stop * columns, o)
        grouped = _grouped(patterns[first:last], config.group)
        base = _base_exponents(grouped)
        scale = _fit_groups(grouped, k, config) if codes is None else codes[first:last]
        stored = _store(grouped, base, config).reshape(last - first, -1)[:, :k]
        padding = ((0, stop * columns - last), (0, 0))
        stored = np.pad(stored, padding)
        draft[start:stop] = _tile(pack_draft(stored >> RESIDUAL_BITS), columns)
        residual[start:stop] = _tile(pack_residual(stored & _RESIDUAL_MASK), columns)
        group_bytes[start:stop] = _tile(np.pad(base | scale << BASE_BITS, padding), columns)

    _parallel_blocks(tiles, columns * k, work)
    _warn_nonfinite(patterns, _untile(group_bytes)[:o], config.group, name)
    planes = (draft, residual, group_bytes)
    return EncodedTensor(name, (o, k), config, columns, *planes, drafted_outputs)


def _check_scale_codes(
    scale_codes: np.ndarray | torch.Tensor, shape: tuple[int, int], name: str
) -> np.ndarray:
    codes = np.asarray(scale_codes)
    if codes.shape != shape or codes.dtype.kind not in "iu":
        raise ValueError(
            f"scale codes of {name!r} are {codes.dtype} {codes.shape}; expected integers {shape}"
        )
    if codes.min() < 0 or codes.max() >= len(SCALE_NUMERATORS):
        raise ValueError(
            f"scale codes of {name!r} span {codes.min()} to {codes.max()}; allowed are 0 to "
            f"{len(SCALE_NUMERATORS) - 1}"
        )
    return codes.astype(np.uint8)
