# SPDX-License-Identifier: Apache-2.0
"""Weight quantisers to compare the draft format with: INT4, NF4, and exponents without a remap.

All take a float16 weight [O, K] and leave activations alone. Scales are FP16; groups of 64 weights
lie along K within a row, the last one of a row may be shorter. Everything is deterministic.

- `int4`: symmetric, codes -7..7, scale = largest magnitude of the group / 7. The customary
  round-to-nearest baseline; the choice of -7..7 instead of -8..7 is ours.
- `nf4`: the sixteen levels of QLoRA (arXiv 2305.14314, appendix E) times the largest magnitude of
  the group. QLoRA quantises the scales once more; here they stay FP16.
- `exponent_window`: what 4 bits of a weight say about it without the graded remap: its sign and
  eight values of the exponent, counted down from the largest of the tensor. A code stands for one
  or two binades; its level is the middle of that range, and a scale fitted by least squares
  corrects all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

GROUP = 64
SCALE_BYTES = 2  # FP16
_LEAST_HALF, _LARGEST_HALF = 2.0**-24, 65504.0

#: NF4's levels, from QLoRA's appendix E.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight after quantisation.

    Attributes
    ----------
    values : torch.float32 [O, K]
        The weight that the codes and scales stand for.
    code_bytes, side_bytes : int
        Storage of the codes, and of the scales and whatever else decoding them needs.
    """

    values: torch.Tensor = field(repr=False)
    code_bytes: int
    side_bytes: int


def half_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as FP16 stores them, in float32: rounded, and within its range but never zero."""
    rounded = scales.clamp(_LEAST_HALF, _LARGEST_HALF).to(torch.float16)
    return rounded.to(torch.float32)


def row_bytes(rows: int, k: int, bits: int) -> int:
    """Storage of [rows, k] codes, every row a whole number of bytes."""
    return rows * -(-k * bits // 8)


def int4(weight: torch.Tensor) -> QuantizedWeight:
    """Symmetric INT4 with a scale per group."""
    groups = _grouped(weight.to(torch.float32))
    scales = half_scales(groups.abs().amax(dim=2, keepdim=True) / 7)
    codes = (groups / scales).round_().clamp_(-7, 7)
    return _result(_ungrouped(codes * scales, weight), scales.numel())


def nf4(weight: torch.Tensor) -> QuantizedWeight:
    """NormalFloat4 with a scale per group: the nearest level, the lower one in a tie."""
    groups = _grouped(weight.to(torch.float32))
    scales = half_scales(groups.abs().amax(dim=2, keepdim=True))
    levels = torch.tensor(NF4_LEVELS)
    bounds = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(groups / scales, bounds, out_int32=True)
    return _result(_ungrouped(levels[codes] * scales, weight), scales.numel())


def exponent_window(
    weight: torch.Tensor, per_group: bool, dropped_bits: int = 0
) -> QuantizedWeight:
    """The sign and how far the exponent lies below the largest one of the tensor, 0 to 7; 7 stands
    for everything below as well.

    Parameters
    ----------
    per_group : a scale per group, or one per tensor
    dropped_bits : 0 or 1
        Low bits of the exponent field that are dropped first; with 1, a code stands for 2 binades.
    """
    bits = weight.view(torch.int16)
    exponent = (bits >> 10 & 31) >> dropped_bits
    below = (exponent.max() - exponent).clamp_(max=7)
    start = torch.exp2(((exponent.max() - below << dropped_bits) - 15).to(torch.float32))
    width = 2.0 ** (1 << dropped_bits)  # the range is start to width * start
    # The last code's range begins at 0 instead.
    middle = start * torch.where(below == 7, width, 1 + width) / 2
    return _fitted(weight, torch.where(bits < 0, -middle, middle), per_group)


def _fitted(weight: torch.Tensor, levels: torch.Tensor, per_group: bool) -> QuantizedWeight:
    """levels float32 [O, K] times the scales that minimise the squared error."""
    target, groups = _grouped(weight.to(torch.float32)), _grouped(levels)
    axes = (2,) if per_group else (0, 1, 2)
    along = (target * groups).sum(axes, keepdim=True, dtype=torch.float64)
    # The levels have the weights' signs, so a scale is never negative.
    scales = half_scales((along / groups.square().sum(axes, keepdim=True)).to(torch.float32))
    return _result(_ungrouped(groups * scales, weight), scales.numel())


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """[O, K] -> [O, groups, GROUP], the last group of a row filled up with zeros."""
    return F.pad(values, (0, -values.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _ungrouped(groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[O, groups, GROUP] -> the shape [O, K] of the weight."""
    return groups.flatten(1)[:, : weight.shape[1]].contiguous()


def _result(values: torch.Tensor, scales: int) -> QuantizedWeight:
    return QuantizedWeight(values, row_bytes(*values.shape, bits=4), SCALE_BYTES * scales)
