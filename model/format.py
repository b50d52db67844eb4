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
    Width 4: word i of a column holds the draft codes of weights 4i .. 4i+3, the first in the low
    bits: 4 weights per word. Widths 5 and 6 are packed as bit planes: a word of *extension* bits
    (the code's bits behind the leading four) followed by the nibble words that it extends:
    1 bit each for 16 weights (width 5), 2 bits each for 8 weights (width 6), the first weight's
    in the low bits. That is 5 words per 16 weights and 3 words per 8 weights, 3.2 and 2.67
    weights per word, no bit is wasted, no weight straddles words, and a decoder needs one
    16-bit register per column instead of a variable-rate gearbox.
residual plane, uint16 [tiles, words, columns]
    The residuals of a column's weights as one little-endian bit stream, cut into 16-bit words;
    it restarts at each tile: 3 words per 4 weights (width 4), 11 per 16 (5), 5 per 8 (6).
group bytes, uint8 [tiles, groups, columns]
    Base exponent in bits 4..0, scale code of the draft levels in bits 7..5.
order, uint16 [K], and shift, uint8 [K]
    Only of tensors whose channels are permuted or scaled.
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
    MAX_SHIFT,
    NIBBLES_PER_WORD,
    NONFINITE_BASE,
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


@cache
def _code_tables(config: FormatConfig) -> tuple[np.ndarray, np.ndarray]:
    """Lookup tables between FP16 patterns and stored words, 8 bits at a time.

    Returns (encode, decode), uint16 [32, 256], indexed by base exponent and by bits 14..7 of the
    FP16 pattern (encode) or of the stored word (decode); they give the other's bits 14..7 in
    place. Bits 15 and 6..0 are the same in both.
    """
    table = np.array(remap_table(config.split))
    base, upper = np.meshgrid(np.arange(32), np.arange(256), indexing="ij")
    exponent, m9, m8, m7 = upper >> 3, upper >> 2 & 1, upper >> 1 & 1, upper & 1
    code = table[((base - exponent) & 31) << 1 | m9]
    q, r2, r1, r0 = code >> 3, code >> 2 & 1, code >> 1 & 1, code & 1
    orders = np.stack(
        [
            _pack_bits(m8, m7, r2, r1, r0),  # class of one half-exponent
            _pack_bits(r0, m8, r2, r1, m7),  # class of one exponent
            _pack_bits(r2, r1, r0, m8, m7),  # class 0, and every class at width 4
        ]
    )
    plain = config.extension_bits == 0
    order = np.where(plain | (q == 0), 2, np.where(q > 7 - 2 * config.split, 0, 1))
    stored = q << 5 | np.take_along_axis(orders, order[None], 0)[0]
    encode = (stored << 7).astype(np.uint16)
    decode = np.zeros_like(encode)
    decode[base, stored] = upper << 7
    return encode, decode


def _pack_bits(*bits: np.ndarray) -> np.ndarray:
    """Concatenate single-bit arrays, the first in the most significant place."""
    word = np.zeros_like(bits[0])
    for bit in bits:
        word = word << 1 | bit
    return word


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
    """Draft values by draft code in units of the level unit, float32 [2^width]."""
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
    level = _signed_levels(config).take(stored >> config.residual_bits)
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


def pack_draft(codes: np.ndarray, config: FormatConfig) -> np.ndarray:
    """Pack draft codes into 16-bit words, the draft plane of independent rows.

    Parameters
    ----------
    codes : uint16 array [rows, K], each below 2^width
    config : FormatConfig

    Returns
    -------
    uint16 array [rows, draft_words(K)]
    """
    rows, k = codes.shape
    nibble_at, extension_at = _draft_positions(k, config)
    extension = config.extension_bits
    codes = np.pad(codes, ((0, 0), (0, -k % NIBBLES_PER_WORD)))
    plane = np.zeros((rows, draft_words(k, config)), np.uint16)
    plane[:, nibble_at] = _merge((codes >> extension).reshape(rows, -1, NIBBLES_PER_WORD), 4)
    if extension:
        per_word = 16 // extension
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
        bits = (codes & np.uint16((1 << extension) - 1)).reshape(rows, -1, per_word)
        plane[:, extension_at] = _merge(bits, extension)
    return plane


def unpack_draft(plane: np.ndarray, k: int, config: FormatConfig) -> np.ndarray:
    """Draft codes, uint16 [rows, K], of a packed plane: the inverse of `pack_draft`."""
    nibble_at, extension_at = _draft_positions(k, config)
    extension = config.extension_bits
    codes = _separate(plane[:, nibble_at], 4, NIBBLES_PER_WORD)[:, :k]
    if extension:
        bits = _separate(plane[:, extension_at], extension, 16 // extension)
        codes = codes << extension | bits[:, :k]
    return codes


def _draft_positions(k: int, config: FormatConfig) -> tuple[np.ndarray, np.ndarray]:
    """Places of the nibble words and of the extension words in a draft plane."""
    nibble = np.arange(-(-k // NIBBLES_PER_WORD))
    if not config.extension_bits:
        return nibble, nibble[:0]
    per_unit = 16 // config.extension_bits // NIBBLES_PER_WORD
    unit = nibble // per_unit
    return nibble + unit + 1, np.unique(unit) * (per_unit + 1)


def _merge(fields: np.ndarray, bits: int) -> np.ndarray:
    """OR together fields [..., n] of `bits` bits, the first in the low place."""
    word = fields[..., 0].copy()
    for i in range(1, fields.shape[-1]):
        word |= fields[..., i] << np.uint16(bits * i)
    return word


def _separate(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `_merge` on [rows, n] words, as [rows, n * count]."""
    out = np.empty((*words.shape, count), np.uint16)
    for i in range(count):
        out[..., i] = words >> np.uint16(bits * i)
    out &= np.uint16((1 << bits) - 1)
    return out.reshape(len(words), -1)


def _stream_overlaps(bits: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """How fields of `bits` bits lie in a stream of 16-bit words.

    Returns fields per period, words per period and (field, word, left shift of the field into
    the word) for each overlap.
    """
    words = bits // np.gcd(bits, 16)
    fields = 16 // np.gcd(bits, 16)
    overlaps = [
        (i, w, bits * i - 16 * w)
        for i in range(fields)
        for w in range(bits * i // 16, (bits * (i + 1) - 1) // 16 + 1)
    ]
    return int(fields), int(words), overlaps


def _shift(values: np.ndarray, amount: int) -> np.ndarray:
    return values << np.uint16(amount) if amount >= 0 else values >> np.uint16(-amount)


def pack_residual(residuals: np.ndarray, config: FormatConfig) -> np.ndarray:
    """Pack residuals, uint16 [rows, K], into uint16 [rows, residual_words(K)]."""
    rows, k = residuals.shape
    fields, words, overlaps = _stream_overlaps(config.residual_bits)
    padded = np.pad(residuals, ((0, 0), (0, -k % fields))) if k % fields else residuals
    padded = padded.reshape(rows, -1, fields)
    plane = np.zeros((rows, padded.shape[1], words), np.uint16)
    for i, w, amount in overlaps:
        plane[..., w] |= _shift(padded[..., i], amount)
    return plane.reshape(rows, -1)[:, : residual_words(k, config)]


def unpack_residual(plane: np.ndarray, k: int, config: FormatConfig) -> np.ndarray:
    """Residuals, uint16 [rows, K], of a packed plane: the inverse of `pack_residual`."""
    fields, words, overlaps = _stream_overlaps(config.residual_bits)
    padded = np.pad(plane, ((0, 0), (0, -plane.shape[1] % words)))
    padded = padded.reshape(len(plane), -1, words)
    out = np.zeros((*padded.shape[:2], fields), np.uint16)
    for i, w, amount in overlaps:
        out[..., i] |= _shift(padded[..., w], -amount)
    out &= np.uint16((1 << config.residual_bits) - 1)
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
    order : numpy.uint16 [K], optional
        The input channel at each position of a row; as they come when not given.
    shift : numpy.uint8 [K], optional
        Exponent of two that scales the weights at each position in the draft, 0 to `MAX_SHIFT`.
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
    order: np.ndarray | None = field(default=None, repr=False)
    shift: np.ndarray | None = field(default=None, repr=False)
    drafted_outputs: int | None = None

    def __post_init__(self) -> None:
        o, k = self.shape
        _check_channels(self.order, self.shift, k, self.name)
        if self.drafted_outputs is not None and not 1 <= self.drafted_outputs <= o:
            raise ValueError(
                f"drafted_outputs of {self.name!r} is {self.drafted_outputs}; expected 1..{o}"
            )
        tiles = -(-o // self.columns)
        expected = {
            "draft_plane": (np.uint16, draft_words(k, self.config)),
            "residual_plane": (np.uint16, residual_words(k, self.config)),
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
            patterns = patterns.reshape(len(words), -1)[:, : self.shape[1]]
            if self.shift is not None:
                patterns = _lower_exponents(patterns, self.shift)
            out[start:stop, slice(None) if self.order is None else self.order] = patterns

        self._for_tiles(work)
        return torch.from_numpy(out.view(np.float16)[: self.shape[0]])

    def draft(self) -> torch.Tensor:
        """The values that draft mode multiplies with, exact in torch.float32 [drafted_outputs, K].

        Permuted and scaled as they are stored (see `arranged`). A group that holds an infinity or a
        NaN gives NaN for all its weights.
        """
        o, k = self.drafted_outputs or self.shape[0], self.shape[1]
        out = np.empty((self._padded_rows, k), np.float32)
        levels, scales = _signed_levels(self.config), _group_scales(self.config)

        def work(start: int, stop: int) -> None:
            tiles = slice(start // self.columns, stop // self.columns)
            codes = unpack_draft(_untile(self.draft_plane[tiles]), k, self.config)
            scale = scales.take(_untile(self.group_bytes[tiles]))
            scale = np.repeat(scale, self.config.group, axis=1)[:, :k]
            np.multiply(levels.take(codes), scale, out=out[start:stop])

        self._for_tiles(work)
        return torch.from_numpy(out[:o])

    def verify_words(self) -> np.ndarray:
        """The words that the array takes in verify mode, uint16 [tiles, K, columns].

        Bits 15..12 hold sign and q, bits 11..0 the rest of the stored word: both planes joined.
        Positions are permuted and exponents shifted as they are stored.
        """
        words = self._stored_words(slice(None))[:, : self.shape[1]]
        return _tile(words, self.columns)

    def storage_bits(self) -> int:
        """Bits in memory: both planes, group bytes, order and shift, padding included."""
        planes = (self.draft_plane, self.residual_plane, self.group_bytes)
        return 8 * (sum(plane.nbytes for plane in planes) + self._channel_bytes)

    def draft_bits(self) -> int:
        """Bits that a draft pass reads: of the tiles that it computes, draft plane and group bytes;
        order and shift."""
        tiles = -(-(self.drafted_outputs or self.shape[0]) // self.columns)
        planes = (self.draft_plane[:tiles], self.group_bytes[:tiles])
        return 8 * (sum(plane.nbytes for plane in planes) + self._channel_bytes)

    @property
    def _channel_bytes(self) -> int:
        return sum(array.nbytes for array in (self.order, self.shift) if array is not None)

    def _stored_words(self, tiles: slice) -> np.ndarray:
        """Stored words, uint16 [rows of the tiles, K]."""
        k = self.shape[1]
        codes = unpack_draft(_untile(self.draft_plane[tiles]), k, self.config)
        residuals = unpack_residual(_untile(self.residual_plane[tiles]), k, self.config)
        return codes << np.uint16(self.config.residual_bits) | residuals

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


def _check_channels(order: np.ndarray | None, shift: np.ndarray | None, k: int, name: str) -> None:
    if order is not None and (
        order.dtype != np.uint16
        or order.shape != (k,)
        or not np.array_equal(np.sort(order), np.arange(k))
    ):
        raise ValueError(f"order of {name!r} is no uint16 permutation of its {k} input channels")
    if shift is not None and (
        shift.dtype != np.uint8 or shift.shape != (k,) or int(shift.max()) > MAX_SHIFT
    ):
        raise ValueError(f"shift of {name!r} is no uint8 [{k}] of values up to {MAX_SHIFT}")


def _raise_exponents(patterns: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """FP16 patterns uint16 [rows, K] with shift [K] added to their exponent fields, mod 32; but
    field 0 stays, and what would become 0 becomes `shift`."""
    fields = patterns >> np.uint16(10) & np.uint16(31)
    added = (fields + shift) & np.uint16(31)
    added = np.where(fields == 0, 0, np.where(added == 0, shift, added))
    return (added << np.uint16(10)).astype(np.uint16) | (patterns & np.uint16(0x83FF))


def _lower_exponents(patterns: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The inverse of `_raise_exponents`."""
    fields = patterns >> np.uint16(10) & np.uint16(31)
    wrapped = np.where(fields == shift, 0, fields)  # becomes 32 - shift
    lowered = np.where(fields == 0, 0, (wrapped - shift.astype(np.int16)) & 31)
    return (lowered << 10).astype(np.uint16) | (patterns & np.uint16(0x83FF))


def _shift_nonfinite(patterns: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """What `arranged` leaves out: infinities and NaNs with the shift added to their exponents."""
    nonfinite = (patterns & np.uint16(0x7C00)) == 0x7C00
    return np.where(nonfinite, _raise_exponents(patterns, shift), patterns)


def arranged(
    weights: torch.Tensor,
    order: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    name: str = "tensor",
) -> torch.Tensor:
    """FP16 weights [O, K] permuted and scaled as `encode` with this order and shift remaps them.

    Zeros and subnormals keep their exponent field, which has no scale, and infinities and NaNs
    theirs, so that they still mark their group.

    Raises
    ------
    TypeError, ValueError
        If dtype or shape of an argument is wrong, or if a scaled weight leaves FP16's range.
    """
    patterns = _as_patterns(weights, name)
    _check_channels(order, shift, patterns.shape[1], name)
    if order is not None:
        patterns = patterns[:, order]
    if shift is not None:
        fields = patterns >> np.uint16(10) & np.uint16(31)
        if ((fields + shift > 30) & (fields < 31)).any():
            raise ValueError(f"shift takes weights of {name!r} out of FP16's range: use less")
        scaled = _raise_exponents(patterns, shift)
        patterns = np.where(fields == 31, patterns, scaled)
    return torch.from_numpy(np.ascontiguousarray(patterns).view(np.float16))


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
    order: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    drafted_outputs: int | None = None,
) -> EncodedTensor:
    """Encode FP16 weights; `EncodedTensor.decode` gives the same bits back.

    Parameters
    ----------
    weights : torch.float16 [O, K]
    config : FormatConfig
    scale_codes : integers [O, ceil(K / group)], 0 to 7, optional
        Scale codes of the draft levels; `fit_scale_codes(arranged(weights, order, shift), config)`
        when not given.
    name : str
        The tensor's name, for messages.
    columns : int
        Columns of the array that the planes are laid out for.
    order, shift, drafted_outputs : optional
        As in `EncodedTensor`.

    Returns
    -------
    EncodedTensor

    Raises
    ------
    TypeError, ValueError
        If dtype, shape or range of an argument is wrong, or a scaled weight leaves FP16's range.

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

    draft = np.empty((tiles, draft_words(k, config), columns), np.uint16)
    residual = np.empty((tiles, residual_words(k, config), columns), np.uint16)
    group_bytes = np.empty((tiles, groups, columns), np.uint8)
    marked = _as_patterns(arranged(weights, order, shift, name), name)
    remapped = marked if shift is None else _shift_nonfinite(marked, shift)

    def work(start: int, stop: int) -> None:
        first, last = start * columns, min(stop * columns, o)
        grouped = _grouped(marked[first:last], config.group)
        base = _base_exponents(grouped)
        scale = _fit_groups(grouped, k, config) if codes is None else codes[first:last]
        if remapped is not marked:
            grouped = _grouped(remapped[first:last], config.group)
        stored = _store(grouped, base, config).reshape(last - first, -1)[:, :k]
        padding = ((0, stop * columns - last), (0, 0))
        stored = np.pad(stored, padding)
        draft[start:stop] = _tile(pack_draft(stored >> config.residual_bits, config), columns)
        mask = np.uint16((1 << config.residual_bits) - 1)
        residual[start:stop] = _tile(pack_residual(stored & mask, config), columns)
        group_bytes[start:stop] = _tile(np.pad(base | scale << BASE_BITS, padding), columns)

    _parallel_blocks(tiles, columns * k, work)
    _warn_nonfinite(patterns, _untile(group_bytes)[:o], config.group, name)
    planes = (draft, residual, group_bytes)
    return EncodedTensor(name, (o, k), config, columns, *planes, order, shift, drafted_outputs)


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
