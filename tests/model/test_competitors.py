# SPDX-License-Identifier: Apache-2.0
"""Quantisers that SPEQ is compared with: formats, roundings, storage, and whole small models."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from speq.model import emulation
from speq.model.baselines import (
    NF4_LEVELS,
    exponent_window,
    half_scales,
    int4,
    nf4,
)
from speq.model.checkpoint import ARCHITECTURES, Model, linear_names
from speq.model.competitors import (
    SCHEMES,
    OliveFormat,
    Scheme,
    activation_stats,
    collect_stats,
    merge_stats,
    olive,
    olive_round,
    olive_scales,
    quantize_model,
    tender,
    tender_activations,
    tender_weight,
)
from speq.model.transformer import KVCache, forward
from tests.model.small_models import random_tokens, random_weights, small_config

SEED = int(os.environ.get("SPEQ_SEED", "0"))
BITS = pytest.mark.parametrize("bits", [4, 8])


def heavy_tailed(rows: int, k: int, seed: int = SEED) -> torch.Tensor:
    """float16 [rows, k]: normal values, one in fifty of them a hundred times too large or so."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=generator)
    spread = torch.rand(rows, k, generator=generator) < 0.02
    values[spread] *= 10 * torch.randn(int(spread.sum()), generator=generator).exp()
    return (0.1 * values).to(torch.float16)


def activations(rows: int, k: int, seed: int = SEED) -> torch.Tensor:
    """float16 [rows, k]: channels of very different size and mean, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    size = (1.5 * torch.randn(k, generator=generator)).exp()
    offset = size * torch.randn(k, generator=generator)
    return (torch.randn(rows, k, generator=generator) * size + offset).to(torch.float16)


def small_model(architecture: str = "llama") -> Model:
    config = small_config(architecture)
    weights = {name: w.to(torch.float16) for name, w in random_weights(config, SEED).items()}
    return Model(f"random {architecture}", config, weights, tokenizer=None)


def group_scales(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of every weight's group of 64 along the row, spelled out."""
    result = torch.empty_like(values)
    for start in range(0, values.shape[1], 64):
        part = values[:, start : start + 64]
        result[:, start : start + 64] = part.abs().amax(1, keepdim=True)
    return result


# INT4, NF4


def test_nf4_levels_are_the_quantiles_of_qloras_definition():
    # 8 positive and 7 negative quantiles of the normal distribution, from its tail to its middle,
    # and zero; the tail starts at the mean of 1 - 1/30 and 1 - 1/32.
    tail = 1 - (1 / 30 + 1 / 32) / 2
    positive = torch.special.ndtri(torch.linspace(0.5, tail, 9, dtype=torch.float64)[1:])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive])
    expected /= expected.abs().max()
    assert torch.allclose(torch.tensor(NF4_LEVELS, dtype=torch.float64), expected, atol=1e-6)


@pytest.mark.parametrize("k", [1, 44, 64, 172])
def test_int4_rounds_to_the_nearest_of_fifteen_levels(k):
    weight = heavy_tailed(9, k)
    result = int4(weight).values
    scale = half_scales(group_scales(weight.float()) / 7)
    codes = result / scale
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() == 7
    # Half a step; the largest magnitude misses its level only by the rounding of the scale.
    assert bool(((result - weight.float()).abs() <= scale * 0.5001).all())


@pytest.mark.parametrize("k", [1, 44, 64, 172])
def test_nf4_rounds_to_the_nearest_level(k):
    weight = heavy_tailed(9, k)
    scale = group_scales(weight.float())
    candidates = torch.tensor(NF4_LEVELS) * scale[..., None]
    nearest = (candidates - weight.float()[..., None]).abs().amin(2)
    result = nf4(weight).values
    assert torch.allclose((result - weight.float()).abs(), nearest, rtol=1e-5, atol=1e-7)
    assert bool((result[..., None] == candidates).any(2).all())


def test_zero_and_tiny_weights_quantize_to_finite_values():
    weight = torch.zeros(3, 64, dtype=torch.float16)
    weight[1, 5] = 2.0**-24
    for quantize in (int4, nf4, partial(exponent_window, per_group=True)):
        assert torch.isfinite(quantize(weight).values).all()
    assert torch.equal(nf4(weight).values, weight.float())


# Exponents without a remap


def test_a_dropped_exponent_bit_leaves_two_binades_per_code():
    # Pairs of exponent fields 17 16 | 15 14 | ... | 3 2 | 1 0; the last code is everything below.
    fields = torch.tensor([17, 16, 15, 14, 13, 5, 4, 3, 2, 1])
    weight = torch.exp2((fields - 15).float()).to(torch.float16)[None]
    levels = exponent_window(-weight, per_group=True, dropped_bits=1).values[0].double()
    pairs = fields // 2
    expected = torch.where(pairs <= 1, 2.0, 2.5) * 4.0 ** pairs.clamp(min=1)
    ratio = levels / expected.double()
    assert torch.allclose(ratio, ratio[0].expand(10), rtol=1e-6)
    assert bool((levels < 0).all())


def test_exponent_window_covers_eight_binades_below_the_largest():
    weight = torch.tensor([[4.0, -2.5, 1.75, 0.03125, 0.02, 0.0, -0.0001]], dtype=torch.float16)
    result = exponent_window(weight, per_group=False).values[0].double()
    # Binades 0, 1, 2 and 7 below the largest; the last level also stands for all that is smaller.
    expected = torch.tensor([6.0, -3.0, 1.5, 2**-5, 2**-5, 2**-5, -(2**-5)], dtype=torch.float64)
    ratio = result / expected
    assert torch.allclose(ratio, ratio[0].expand(7), rtol=1e-6)
    best = float((weight.double() * expected).sum() / expected.square().sum())
    assert float(ratio[0]) == pytest.approx(best, rel=2**-11)


def test_fitted_scales_have_the_least_squared_error():
    weight = heavy_tailed(4, 200)
    exact = weight.double()

    def error(values: torch.Tensor) -> torch.Tensor:
        return (values.double() - exact)[:, :64].square().sum(1)

    fitted = exponent_window(weight, per_group=True).values
    for factor in (0.99, 1.01):
        assert bool((error(fitted) <= error(fitted * factor)).all())
    single = exponent_window(weight, per_group=False).values
    assert (fitted - weight.float()).square().sum() < (single - weight.float()).square().sum()


# OliVe


def test_olive_4_bit_format():
    form = OliveFormat(4)
    assert form.largest_normal == 7
    assert form.bias == 2
    assert form.outliers == [12, 16, 24, 32, 48, 64, 96]


def test_olive_8_bit_format():
    form = OliveFormat(8)
    assert form.largest_normal == 127
    assert form.bias == 4
    assert len(form.outliers) == 127  # a code per magnitude of 7 bits, without zero
    assert form.outliers[:8] == [144, 160, 176, 192, 208, 224, 240, 256]
    assert form.outliers[-1] == 15 << 19
    assert form.outliers == sorted(set(form.outliers))


def test_olive_victims_are_zero_and_the_larger_outlier_survives():
    values = [3.2, -50.0, 20.5, 90.0, 5.4, -6.6, 1e9, 9.4, 9.6, 2.0, -30.0, 30.0, 0.0, -13.0]
    expected = [0, -48, 0, 96, 5, -7, 96, 0, 12, 0, -32, 0, 0, -12]
    assert olive_round(torch.tensor([values]), OliveFormat(4)).tolist() == [expected]
    # The last value of an odd row has a zero for a partner.
    assert olive_round(torch.tensor([values[:3]]), OliveFormat(4)).tolist() == [[0, -48, 24]]


def nearest_levels(pair: list[float], form: OliveFormat) -> list[int]:
    """The rule for one pair, by trying all levels."""
    normal = range(-form.largest_normal, form.largest_normal + 1)
    outliers = [sign * magnitude for magnitude in form.outliers for sign in (1, -1)]
    found = [min([*normal, *outliers], key=lambda level: abs(level - value)) for value in pair]
    big = [abs(level) > form.largest_normal for level in found]
    if any(big):
        victim = 1 if big[0] and (not big[1] or abs(pair[0]) >= abs(pair[1])) else 0
        found[victim] = 0
    return found


def encode_pair(pair: list[int], form: OliveFormat) -> list[int]:
    """Codes of a pair of levels: the identifier marks the victim."""
    identifier = 1 << (form.bits - 1)
    big = [abs(level) > form.largest_normal for level in pair]
    if not any(big):
        return [level % (1 << form.bits) for level in pair]
    i = big.index(True)
    codes = [identifier, identifier]
    codes[i] = form.outliers.index(abs(pair[i])) + 1 | (identifier if pair[i] < 0 else 0)
    return codes


def decode_pair(codes: list[int], form: OliveFormat) -> list[int]:
    """Levels of a pair of codes, with abfloat's definition spelled out."""
    identifier = 1 << (form.bits - 1)
    if identifier not in codes:
        return [code - 2 * identifier if code & identifier else code for code in codes]
    i = 1 - codes.index(identifier)
    magnitude, m = codes[i] & identifier - 1, form.mantissa_bits
    value = (1 << m | magnitude & (1 << m) - 1) << (magnitude >> m) + form.bias
    levels = [0, 0]
    levels[i] = -value if codes[i] & identifier else value
    return levels


@BITS
def test_olive_rounds_pairs_to_what_its_codes_represent(bits):
    form = OliveFormat(bits)
    # The factors are odd so that no value lies exactly between two levels.
    values = heavy_tailed(20, 50).float() * (30.137 if bits == 4 else 401.371)
    levels = olive_round(values, form)
    pairs = levels.view(-1, 2).to(torch.int64).tolist()
    assert pairs == [nearest_levels(pair, form) for pair in values.view(-1, 2).tolist()]
    codes = [encode_pair(pair, form) for pair in pairs]
    assert [decode_pair(pair, form) for pair in codes] == pairs
    identifier = 1 << (bits - 1)
    flat = [code for pair in codes for code in pair]
    assert all(0 <= code < 1 << bits for code in flat)
    assert all(pair.count(identifier) <= 1 for pair in codes)
    assert identifier in flat  # the sample has outliers


def test_olive_scales_have_the_least_error_of_the_search():
    form = OliveFormat(4)
    values = heavy_tailed(700, 33).float()  # more rows than one piece of the search
    for per_row in (True, False):
        scales = olive_scales(values, form, per_row)
        assert scales.shape == ((700, 1) if per_row else (1, 1))
        std, mean = torch.std_mean(values, 1 if per_row else (0, 1), correction=0, keepdim=True)
        limit = (mean.abs() + 3 * std) / 7

        def error(scale: torch.Tensor, per_row: bool = per_row) -> torch.Tensor:
            squares = (olive_round(values / scale, form) * scale - values).square()
            return squares.sum(1 if per_row else (0, 1), dtype=torch.float64)

        chosen = error(scales)
        for ratio in (0.75, 1.05, 1.55, 2.45):
            assert bool((chosen <= error(half_scales(limit * ratio)) * (1 + 1e-6)).all())
    assert torch.isfinite(olive_scales(torch.zeros(2, 3), form, True)).all()


def test_olive_is_defined_for_4_and_8_bits():
    with pytest.raises(ValueError, match="OliVe is defined for 4 and 8 bits, not 6"):
        OliveFormat(6)


# Tender


def test_tender_groups_are_powers_of_two_apart():
    largest = torch.tensor([-8.0, 4.01, 4.0, 2.0, 1.9, 0.0625, 0.01, 0.0])
    x = torch.stack([largest, torch.zeros(8)]).to(torch.float16)
    activations = tender_activations(4, activation_stats(x), centered=False)
    assert activations.groups.tolist() == [0, 0, 1, 2, 2, 7, 7, 7]
    assert float(activations.scale) == pytest.approx(8 / 7)
    expected = [activations.scale / 2**g for g in activations.groups.tolist()]
    assert activations.channel_scales().tolist() == [float(scale) for scale in expected]
    assert activations.codes(x)[0].tolist() == [-7, 4, 7, 7, 7, 7, 1, 0]


@BITS
def test_tender_does_not_saturate_within_the_calibrated_range(bits):
    x = activations(50, 70)
    quantizer = tender_activations(bits, activation_stats(x), centered=True)
    assert len(quantizer.groups.unique()) > 3
    assert quantizer.codes(x).abs().max() == 2 ** (bits - 1) - 1
    error = (quantizer(x) + quantizer.center - x.float()).abs()
    assert bool((error <= 0.501 * quantizer.channel_scales()).all())
    # Every channel but those of the last group uses more than half of its range.
    channel_max = quantizer.codes(x).abs().amax(0)
    upper = channel_max[quantizer.groups < 7]
    assert bool((upper >= 2 ** (bits - 2) - 1).all())
    far = quantizer.codes((100 * x.float()).clamp(-60000, 60000).to(torch.float16))
    assert far.min() == -(2 ** (bits - 1))
    assert far.max() == 2 ** (bits - 1) - 1


@BITS
def test_tender_joins_groups_by_shifting_the_accumulator(bits):
    x, weight = activations(5, 70), heavy_tailed(12, 70)
    layer = tender(bits, "block.0.o_proj", weight, activation_stats(x))
    quantizer = layer.activations
    codes, scales = tender_weight(weight, bits)
    x_codes = quantizer.codes(x).to(torch.int64)
    total = torch.zeros(5, 12, dtype=torch.int64)
    for group in range(8):
        channels = quantizer.groups == group
        total = 2 * total + x_codes[:, channels] @ codes[:, channels].to(torch.int64).T
    unit = quantizer.scale.double() / 2**7
    expected = total * unit * scales.double().T
    assert layer.offset is None
    assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_tender_subtracts_channel_centers_behind_norms_only():
    x = torch.full((4, 8), 3.0, dtype=torch.float16)
    x[1] = 5.0
    weight = heavy_tailed(6, 8)
    for name, centered in (("block.1.q_proj", True), ("head", True), ("block.1.down_proj", False)):
        layer = tender(4, name, weight, activation_stats(x))
        assert layer.activations.center.unique().tolist() == [4.0 if centered else 0.0]
        middle = torch.full((1, 8), 4.0, dtype=torch.float16)
        if centered:
            assert not layer.activations(middle).any()
            assert torch.equal(layer(middle)[0], layer.offset)
            exact = 4 * weight.double().sum(1)
            assert torch.allclose(layer.offset.double(), exact, rtol=2**-10, atol=1e-3)


# Both


@pytest.mark.parametrize(("quantizer", "inputs"), [(olive, heavy_tailed), (tender, activations)])
def test_eight_bits_are_better_than_four(quantizer, inputs):
    x, weight = inputs(64, 300), heavy_tailed(40, 300, SEED + 1)
    exact = x.double() @ weight.double().T
    errors = {}
    for bits in (4, 8):
        layer = quantizer(bits, "block.0.q_proj", weight, activation_stats(x, every=1))
        errors[bits] = float((layer(x) - exact).norm() / exact.norm())
    assert errors[8] < 0.15
    assert errors[8] < errors[4] / 2


STORAGE = {  # bytes of a weight [10, 173] behind a norm: codes, row or group scales, the rest
    "olive4": (10 * 87 + 10 * 2 + 4, None),
    "olive8": (10 * 174 + 10 * 2 + 4, None),
    "tender4": (10 * 87 + 10 * 2 + 65 + 4 + 2 * (173 + 10), None),
    "tender8": (10 * 173 + 10 * 2 + 65 + 4 + 2 * (173 + 10), None),
    "int4": (10 * 87 + 10 * 3 * 2, None),
    "nf4": (10 * 87 + 10 * 3 * 2, None),
    "exponent-bits": (10 * 87 + 10 * 3 * 2, 10 * 3 * 2),
    "window-tensor-scale": (10 * 87 + 2, 2),
    "window-group-scale": (10 * 87 + 10 * 3 * 2, 10 * 3 * 2),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_storage_counts_codes_scales_and_side_information(name):
    streamed, added = STORAGE[name]
    stats = activation_stats(activations(8, 173))
    layer = SCHEMES[name].quantizer("block.0.q_proj", heavy_tailed(10, 173), stats)
    assert layer.bytes_streamed == streamed
    assert layer.bytes_added == (streamed if added is None else added)


def test_tender_without_centers_stores_none():
    stats = activation_stats(activations(8, 173))
    layer = tender(4, "block.0.down_proj", heavy_tailed(10, 173), stats)
    assert layer.bytes_streamed == STORAGE["tender4"][0] - 2 * (173 + 10)


# Calibration


def test_statistics_of_parts_merge_to_those_of_the_whole():
    x = activations(37, 5)
    whole = activation_stats(x, every=4)
    merged = activation_stats(x[:10], every=4)
    for start, stop in ((10, 11), (11, 13), (13, 37)):
        merged = merge_stats(merged, activation_stats(x[start:stop], every=4, before=start))
    assert merged.count == whole.count == 37
    assert torch.equal(merged.sample, x[::4])
    assert torch.equal(whole.sample, x[::4])
    assert torch.equal(merged.absmax, x.float().abs().amax(0))
    assert torch.equal(merged.minimum, whole.minimum)
    assert torch.allclose(merged.mean_square, x.double().square().mean(0).float(), rtol=1e-5)


def test_collected_statistics_are_those_of_the_exact_pass():
    model = small_model()
    texts = [random_tokens(model.config, 9, SEED), random_tokens(model.config, 14, SEED + 1)]
    stats = collect_stats(model, texts, every=1)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linear_names(model.config)}
    for tokens in texts:
        cache = KVCache(model.config, len(tokens))
        forward(model, tokens, cache, capture=lambda name, x: inputs[name].append(x))
    for name, parts in inputs.items():
        exact = activation_stats(torch.cat(parts), every=1)
        assert stats[name].count == 23
        for attribute in ("absmax", "mean_square", "sample"):
            found, expected = getattr(stats[name], attribute), getattr(exact, attribute)
            assert torch.allclose(found.float(), expected.float(), rtol=2e-3, atol=2e-3), name


@pytest.mark.parametrize("texts", [[], [[1, 2], []]])
def test_calibration_needs_text(texts):
    with pytest.raises(ValueError, match="calibration needs at least one text, and none may be em"):
        collect_stats(small_model(), texts)


# Whole models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_schemes_run_whole_models(architecture):
    model = small_model(architecture)
    texts = [random_tokens(model.config, 40, SEED + i) for i in range(3)]
    stats = collect_stats(model, texts)
    tokens = random_tokens(model.config, 20, SEED + 9)
    exact = emulation.logits(model, tokens)
    errors = {}
    for name, scheme in SCHEMES.items():
        quantized = quantize_model(model, scheme, stats if scheme.calibrated else None)
        found = emulation.logits(model, tokens, quantized.linear)
        errors[name] = float((found - exact).norm() / exact.norm())
        assert quantized.bytes_added <= quantized.bytes_streamed < 0.75 * quantized.bytes_fp16
    assert errors["olive8"] < errors["olive4"]
    assert errors["tender8"] < errors["tender4"]
    assert max(errors["olive8"], errors["tender8"]) < min(errors["int4"], errors["nf4"])
    assert 0.01 < errors["int4"] < 0.5
    assert 0.01 < errors["nf4"] < 0.5


def test_head_can_stay_fp16():
    model = small_model("qwen2")
    quantized = quantize_model(model, SCHEMES["int4"], head=False)
    everything = quantize_model(model, SCHEMES["int4"])
    head = model.linear_weight("head")
    x = activations(3, head.shape[1])
    assert torch.equal(quantized.linear("head", x), x.float() @ head.float().T)
    saved = quantized.bytes_streamed - everything.bytes_streamed
    assert saved == 2 * head.numel() - everything.layers["head"].bytes_streamed
    assert quantized.layers["head"].bytes_added == 0
    assert quantized.bytes_fp16 == everything.bytes_fp16


def test_quantized_values_are_deterministic():
    model = small_model()
    stats = collect_stats(model, [random_tokens(model.config, 30, SEED)])
    for scheme in SCHEMES.values():
        first, second = (quantize_model(model, scheme, stats) for _ in range(2))
        for name, layer in first.layers.items():
            assert torch.equal(layer.weight, second.layers[name].weight)


@pytest.mark.parametrize("name", ["olive4", "tender8"])
def test_calibrated_schemes_need_fitting_statistics(name):
    model = small_model()
    with pytest.raises(ValueError, match=f"{name} needs activation statistics of block.0.q_proj"):
        quantize_model(model, SCHEMES[name])
    stats = collect_stats(model, [random_tokens(model.config, 5, SEED)])
    stats["head"] = stats["block.0.down_proj"]
    with pytest.raises(ValueError, match="statistics of head, of 64 channels"):
        quantize_model(model, SCHEMES[name], stats)


def test_nonfinite_weights_are_refused():
    model = small_model()
    model.weights["block.1.up_proj"][3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"block\.1\.up_proj has infinities or NaNs: x cannot"):
        quantize_model(model, Scheme("x", SCHEMES["int4"].quantizer, False))
