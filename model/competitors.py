# SPDX-License-Identifier: Apache-2.0
"""The accelerators that SPEQ is compared with, as quantisers: OliVe, Tender, and weight-only ones.

`quantize_model` turns a loaded model into the linear layers of one of `SCHEMES`, in float32
products of the values that the codes stand for, and counts the bytes that a pass reads. They are
lossy and no contract covers them: the quantised values are deterministic, the products depend on
torch's order of summation. Attention's own products stay FP16 in every scheme.

OliVe (ISCA'23, arXiv 2304.07493)
    Weights and activations in 4 or 8 bits. Two neighbours form a pair. Normal values are int4
    (-7..7) or int8 (-127..127); the code 1000b (10000000b) never stands for a number, it says that
    the other value of the pair is an outlier and that its own, the victim, is zero. Outliers are
    abfloat: E2M1 or E4M3, a leading one, and an exponent bias such that the smallest outlier lies
    just above the normal values; the abfloat codes of zero are not used. Of two outliers the larger
    survives. The scale starts at 3 sigma and is searched for the least squared error.
    From the authors' published implementation: a value is rounded to the nearest normal or outlier
    level, the search covers 0.75 to 2.5 times 3 sigma, weights have a scale per output row and
    activations a static one per tensor. (It uses 2 exponent bits for 8-bit outliers too; we follow
    the paper.) Ours: pairs lie along K within a row and an odd K is filled up with a zero; the
    search's step of 0.05; row scales are FP16; of two equal outliers the first survives.

Tender (ISCA'24, arXiv 2406.12930)
    Weights and activations in 4 or 8 bits. Channels of the activations are put into groups by their
    largest calibrated magnitude, relative to the tensor's: group g, with the scale tensor maximum /
    2^g / 7 (or 127), takes the channels above half its range. Because the scales are powers of two
    apart, the sums of the groups are joined by shifting the accumulator. Weights are symmetric per
    output row. (maximum + minimum) / 2 of a channel is subtracted first and its product with the
    weight is added to the output.
    From the authors' published implementation: 8 groups, codes -8..7 (-128..127), subtraction only
    where the input comes from a norm, the added product taken from the unquantised weight.
    Ours: one row chunk (they calibrate every 256 positions apart); channels never go one group down
    (they try that and keep what calibrates better); row scales and offsets are FP16.

INT4, NF4 and the exponent baselines are in `speq.model.baselines`. Their activations stay FP16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from speq.model.baselines import (
    SCALE_BYTES,
    QuantizedWeight,
    exponent_window,
    half_scales,
    int4,
    nf4,
    row_bytes,
)
from speq.model.checkpoint import Model, linear_names
from speq.model.emulation import float_linear, float_weights, prefill

TENDER_GROUPS = 8
_TENSOR_SCALE_BYTES = 4  # FP32
_SEARCH_RATIOS = [i / 20 for i in range(15, 51, 2)]  # of 3 sigma
_SEARCH_ROWS = 64  # weights are searched in pieces that fit into the caches


# Calibration


@dataclass(frozen=True, eq=False)
class ActivationStats:
    """What a linear layer's inputs look like on calibration text.

    Attributes
    ----------
    count : int
        Inputs seen.
    minimum, maximum, mean_square : torch.float32 [K]
        Of every channel.
    sample : torch.float16 [S, K]
        Some of the inputs themselves.
    """

    count: int
    minimum: torch.Tensor
    maximum: torch.Tensor
    mean_square: torch.Tensor
    sample: torch.Tensor = field(repr=False)

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude of every channel, float32 [K]."""
        return torch.maximum(self.maximum, -self.minimum)


def activation_stats(x: torch.Tensor, every: int = 4, before: int = 0) -> ActivationStats:
    """Statistics of inputs float16 [N, K], of which the sample takes every `every`-th, counted from
    `before` inputs earlier."""
    values = x.to(torch.float32)
    low, high = torch.aminmax(values, dim=0)
    sample = x[-before % every :: every].clone()
    return ActivationStats(len(x), low, high, values.square().mean(dim=0), sample)


def merge_stats(a: ActivationStats, b: ActivationStats) -> ActivationStats:
    """Statistics of the inputs of both."""
    count = a.count + b.count
    return ActivationStats(
        count,
        torch.minimum(a.minimum, b.minimum),
        torch.maximum(a.maximum, b.maximum),
        (a.mean_square * a.count + b.mean_square * b.count) / count,
        torch.cat([a.sample, b.sample]),
    )


def collect_stats(
    model: Model, texts: Iterable[Sequence[int]], every: int = 4
) -> dict[str, ActivationStats]:
    """Statistics of the inputs of all linear layers over calibration texts (token ids, at least one
    text), computed with the float32 emulation; the sample takes every `every`-th.

    Tokens are sampled as often as they occur, because the first token of a text can have
    activations a thousand times as large as the others, and would decide every squared error. What
    exceeds the ranges seen saturates in Tender: calibrate with thousands of varied tokens.
    """
    stats: dict[str, ActivationStats] = {}
    exact = float_linear(float_weights(model))

    def observed(name: str, x: torch.Tensor) -> torch.Tensor:
        known = stats.get(name)
        new = activation_stats(x, every, known.count if known else 0)
        stats[name] = merge_stats(known, new) if known else new
        return exact(name, x)

    texts = list(texts)
    if not texts or not all(map(len, texts)):
        raise ValueError("calibration needs at least one text, and none may be empty")
    for tokens in texts:
        prefill(model, tokens, observed)
    return stats


# Quantised layers


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """A linear layer after quantisation: y = activations(x) @ weight.T + offset.

    Attributes
    ----------
    weight : torch.float32 [O, K]
    activations : float16 [N, K] -> float32 [N, K], the values of the quantised activations
    offset : torch.float32 [O], optional
    bytes_streamed : int
        What a pass reads: codes, scales and all side information.
    bytes_added : int
        What it takes beside the FP16 model, as a draft model for it.
    """

    weight: torch.Tensor = field(repr=False)
    activations: Callable[[torch.Tensor], torch.Tensor]
    offset: torch.Tensor | None
    bytes_streamed: int
    bytes_added: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float16 [N, K] -> float32 [N, O]."""
        y = self.activations(x) @ self.weight.T
        return y if self.offset is None else y + self.offset


# (name, weight float16 [O, K], statistics of its inputs) -> the layer
Quantizer = Callable[[str, torch.Tensor, ActivationStats | None], QuantizedLinear]


@dataclass(frozen=True)
class Scheme:
    """A way to quantise linear layers. `calibrated` says whether it needs `ActivationStats`."""

    name: str
    quantizer: Quantizer
    calibrated: bool


def weight_only(
    quantize: Callable[[torch.Tensor], QuantizedWeight],
    shared: bool,
    name: str,
    weight: torch.Tensor,
    stats: ActivationStats | None,
) -> QuantizedLinear:
    """A layer with FP16 activations. If `shared`, its codes are bits of the FP16 weights, so that
    only the scales take storage of their own."""
    q = quantize(weight)
    total = q.code_bytes + q.side_bytes
    return QuantizedLinear(q.values, _unquantized, None, total, q.side_bytes if shared else total)


def _unquantized(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32)


# OliVe


@dataclass(frozen=True)
class OliveFormat:
    """OliVe's number formats at 4 or 8 bits, in units of the scale. Raises ValueError otherwise."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"OliVe is defined for 4 and 8 bits, not {self.bits}")

    @property
    def largest_normal(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def mantissa_bits(self) -> int:
        """Of the abfloat code, which has a sign, an exponent and a mantissa: E2M1 or E4M3."""
        return 1 if self.bits == 4 else 3

    @property
    def bias(self) -> int:
        """The least one that lifts the smallest outlier over the normal values."""
        smallest, bias = 2**self.mantissa_bits + 1, 0
        while smallest << bias <= self.largest_normal:
            bias += 1
        return bias

    @property
    def outliers(self) -> list[int]:
        """Outlier magnitudes by abfloat code, from code 1: (1.mantissa) * 2^(exponent + bias)."""
        m = self.mantissa_bits
        codes = range(1, 2 ** (self.bits - 1))
        return [(2**m + code % 2**m) << (code >> m) + self.bias for code in codes]


def olive_round(values: torch.Tensor, form: OliveFormat) -> torch.Tensor:
    """Rounds values, in units of the scale, float32 [N, K], to what outlier-victim pairs represent.

    The result is the code's level: a normal value, an outlier, or zero for a victim.
    """
    smallest, largest = form.outliers[0], form.outliers[-1]
    k = values.shape[1]
    values = F.pad(values, (0, k % 2))
    magnitude = values.abs()
    is_outlier = magnitude > (form.largest_normal + smallest) / 2
    levels = values.round().clamp_(-form.largest_normal, form.largest_normal)

    big = magnitude[is_outlier]
    _, exponent = torch.frexp(big)  # 2^(exponent - 1) <= big
    step = torch.exp2((exponent - 1 - form.mantissa_bits).to(torch.float32))
    rounded = ((big / step).round_() * step).clamp_(smallest, largest)
    levels[is_outlier] = torch.copysign(rounded, values[is_outlier])

    first, second = magnitude.unflatten(1, (-1, 2)).unbind(2)
    outlier_first, outlier_second = is_outlier.unflatten(1, (-1, 2)).unbind(2)
    victims = (outlier_second & (second > first), outlier_first & (first >= second))
    levels.masked_fill_(torch.stack(victims, dim=2).flatten(1), 0)
    return levels[:, :k]


def olive_scales(values: torch.Tensor, form: OliveFormat, per_row: bool) -> torch.Tensor:
    """The scales of values float32 [N, K] with the least squared error, [N, 1] or [1, 1]."""
    axes = (1,) if per_row else (0, 1)
    std, mean = torch.std_mean(values, axes, correction=0, keepdim=True)
    limit = mean.abs() + 3 * std
    limit = torch.where(limit > 0, limit, 1.0)  # all zero: any scale will do
    scales = [half_scales(limit * ratio / form.largest_normal) for ratio in _SEARCH_RATIOS]
    errors = torch.zeros(len(scales), len(values), 1, dtype=torch.float64)
    for start in range(0, len(values), _SEARCH_ROWS):
        part = slice(start, start + _SEARCH_ROWS)
        for i, scale in enumerate(scales):
            scale = scale[part] if per_row else scale
            error = olive_round(values[part] / scale, form) * scale - values[part]
            errors[i, part] = error.square().sum(1, keepdim=True)
    if not per_row:
        errors = errors.sum(1, keepdim=True)
    return torch.stack(scales).gather(0, errors.argmin(0, keepdim=True))[0]


@dataclass(frozen=True, eq=False)
class OliveActivations:
    """Activations in OliVe's format with a static scale per tensor."""

    form: OliveFormat
    scale: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return olive_round(x.to(torch.float32) / self.scale, self.form) * self.scale


def olive(
    bits: int, name: str, weight: torch.Tensor, stats: ActivationStats, per_row: bool = True
) -> QuantizedLinear:
    """A layer with weights and activations in OliVe's format; weight scales per row or tensor."""
    form = OliveFormat(bits)
    rows, k = weight.shape
    values = weight.to(torch.float32)
    scales = olive_scales(values, form, per_row)
    x_scale = olive_scales(stats.sample.to(torch.float32), form, per_row=False)
    total = row_bytes(rows, k + k % 2, bits) + SCALE_BYTES * scales.numel() + _TENSOR_SCALE_BYTES
    quantized = olive_round(values / scales, form) * scales
    return QuantizedLinear(quantized, OliveActivations(form, x_scale), None, total, total)


# Tender


@dataclass(frozen=True, eq=False)
class TenderActivations:
    """Activations decomposed into channel groups whose scales are powers of two apart.

    Attributes
    ----------
    bits : int
    center : torch.float32 [K]
        What is subtracted from every channel.
    scale : torch.float32, scalar
        Of group 0; group g has scale / 2^g.
    groups : torch.int64 [K]
        Each channel's group.
    """

    bits: int
    center: torch.Tensor
    scale: torch.Tensor
    groups: torch.Tensor

    def channel_scales(self) -> torch.Tensor:
        """float32 [K]."""
        return self.scale * torch.exp2(-self.groups.to(torch.float32))

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Integers, as float32 [N, K], of inputs float16 [N, K]. Saturates."""
        values = (x.to(torch.float32) - self.center) / self.channel_scales()
        return values.round_().clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.codes(x) * self.channel_scales()


def tender_activations(bits: int, stats: ActivationStats, centered: bool) -> TenderActivations:
    """Sorts the channels into groups by their calibrated magnitudes."""
    center = torch.zeros_like(stats.maximum)
    if centered:
        center = ((stats.maximum + stats.minimum) / 2).to(torch.float16).to(torch.float32)
    channel_max = torch.maximum(stats.maximum - center, center - stats.minimum)
    tensor_max = channel_max.max()
    tensor_max = torch.where(tensor_max > 0, tensor_max, 1.0)
    bounds = tensor_max * torch.exp2(-torch.arange(1.0, TENDER_GROUPS))
    groups = (channel_max[:, None] <= bounds).sum(1)
    return TenderActivations(bits, center, tensor_max / (2 ** (bits - 1) - 1), groups)


def tender_weight(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers, as float32 [O, K], and scales [O, 1] of a weight, per output row."""
    values, largest = weight.to(torch.float32), 2 ** (bits - 1) - 1
    scales = half_scales(values.abs().amax(dim=1, keepdim=True) / largest)
    return (values / scales).round_().clamp_(-largest, largest), scales


def tender(bits: int, name: str, weight: torch.Tensor, stats: ActivationStats) -> QuantizedLinear:
    """A layer with decomposed activations and weights symmetric per row."""
    rows, k = weight.shape
    centered = not name.endswith(("o_proj", "down_proj"))  # the two that follow no norm
    activations = tender_activations(bits, stats, centered)
    codes, scales = tender_weight(weight, bits)
    group_bits = (TENDER_GROUPS - 1).bit_length()
    total = row_bytes(rows, k, bits) + SCALE_BYTES * rows
    total += row_bytes(1, k, group_bits) + _TENSOR_SCALE_BYTES
    offset = None
    if centered:
        offset = activations.center @ weight.to(torch.float32).T
        offset = offset.to(torch.float16).to(torch.float32)
        total += SCALE_BYTES * (k + rows)
    return QuantizedLinear(codes * scales, activations, offset, total, total)


# Whole models


def _with_stats(
    quantizer: Callable[[str, torch.Tensor, ActivationStats], QuantizedLinear],
) -> Quantizer:
    """The same, refusing a layer without statistics."""

    def checked(name: str, weight: torch.Tensor, stats: ActivationStats | None) -> QuantizedLinear:
        if stats is None:
            raise ValueError(f"{name} has no activation statistics")
        return quantizer(name, weight, stats)

    return checked


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("olive4", _with_stats(partial(olive, 4)), calibrated=True),
        Scheme("olive8", _with_stats(partial(olive, 8)), calibrated=True),
        Scheme("tender4", _with_stats(partial(tender, 4)), calibrated=True),
        Scheme("tender8", _with_stats(partial(tender, 8)), calibrated=True),
        Scheme("int4", partial(weight_only, int4, False), calibrated=False),
        Scheme("nf4", partial(weight_only, nf4, False), calibrated=False),
        Scheme(
            "exponent-bits",
            partial(weight_only, partial(exponent_window, per_group=True, dropped_bits=1), True),
            calibrated=False,
        ),
        Scheme(
            "window-tensor-scale",
            partial(weight_only, partial(exponent_window, per_group=False), True),
            calibrated=False,
        ),
        Scheme(
            "window-group-scale",
            partial(weight_only, partial(exponent_window, per_group=True), True),
            calibrated=False,
        ),
    )
}


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """The linear layers of a model in one scheme; `linear` fits `speq.model.emulation`."""

    scheme: str
    layers: dict[str, QuantizedLinear] = field(repr=False)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Linear layer `name` without its bias: float16 [N, K] -> float32 [N, O]."""
        return self.layers[name](x)

    @property
    def bytes_fp16(self) -> int:
        """What a pass of the FP16 model reads."""
        return sum(2 * layer.weight.numel() for layer in self.layers.values())

    @property
    def bytes_streamed(self) -> int:
        """What a pass reads."""
        return sum(layer.bytes_streamed for layer in self.layers.values())

    @property
    def bytes_added(self) -> int:
        """What it takes beside the FP16 model as its external draft model."""
        return sum(layer.bytes_added for layer in self.layers.values())


def quantize_model(
    model: Model,
    scheme: Scheme,
    stats: Mapping[str, ActivationStats] | None = None,
    head: bool = True,
) -> QuantizedModel:
    """Quantises all linear layers of a model, or, without `head`, all but the LM head, which then
    stays FP16 (read by every pass, no storage of its own).

    Parameters
    ----------
    stats : from `collect_stats`, for schemes with quantised activations

    Raises
    ------
    ValueError
        If a calibrated scheme gets no statistics for a layer, or statistics of another shape, or if
        a weight has infinities or NaNs.
    """
    layers = {}
    for name in linear_names(model.config):
        weight = model.linear_weight(name)
        if name == "head" and not head:
            values = weight.to(torch.float32)
            layers[name] = QuantizedLinear(values, _unquantized, None, 2 * weight.numel(), 0)
            continue
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} has infinities or NaNs: {scheme.name} cannot represent them")
        known = stats.get(name) if stats else None
        if scheme.calibrated and (known is None or known.maximum.shape != weight.shape[1:]):
            raise ValueError(
                f"{scheme.name} needs activation statistics of {name}, of {weight.shape[1]} "
                "channels: pass what collect_stats returns for this model"
            )
        layers[name] = scheme.quantizer(name, weight, known)
    return QuantizedModel(scheme.name, layers)
