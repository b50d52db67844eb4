# SPDX-License-Identifier: Apache-2.0
"""The encoder's optimiser: which of the lossless encodings of a model drafts best.

Every choice below leaves the weights' bits alone (contract C1) and the verify pass with them; what
changes is the draft model inside, and the bytes that a draft pass reads.

    scale codes   minimise the error of a layer's outputs on calibration inputs, tr(E M E^T) with E
                  the error of the drafted weights and M the second moment of the inputs, E[x x^T].
                  M's diagonal alone would ignore that errors of correlated inputs add up, or
                  cancel: coordinate descent over the groups of a row takes the whole of M.
    channels      power-of-two scales after the inputs' magnitude (the idea of Lin et al., "AWQ",
                  2023, with exact powers of two), and an order that puts channels of like weights
                  into the same groups.
    split, width  per tensor. What a tensor's error does to the model is measured: the
                  Kullback-Leibler divergence of the model with only some tensors drafted from the
                  target, per unit of error (`sensitivities`). Every tensor then takes the option
                  that minimises divergence + price * bytes, and the price itself, which decides
                  between many bits and few, is chosen by the speedup that drafts reach on the
                  calibration texts.
    vocabulary    the head drafts only the lowest token ids if that pays. Byte-pair encodings number
                  tokens by the order of their merges, so that high ids are rare ones.

Everything is deterministic; emulated in float32 (`speq.model.emulation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from speq.model.checkpoint import Model, linear_names
from speq.model.emulation import (
    Chains,
    Text,
    decode,
    draft_chains,
    draft_linear,
    float_linear,
    float_weights,
    prefill,
)
from speq.model.evaluation import Costs, Sample, best_settings, encoded_costs, speedup
from speq.model.format import EncodedTensor, arranged, encode
from speq.model.number_format import (
    DRAFT_WIDTHS,
    MAX_SHIFT,
    SCALE_DENOMINATOR,
    SCALE_NUMERATORS,
    UNIT_SCALE_CODE,
    FormatConfig,
    draft_words,
)
from speq.model.speculation import Settings

# Early-exit thresholds among which the best is chosen.
_THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
#: Parts of the vocabulary that the head may draft.
HEAD_PARTS = (1.0, 0.75, 0.5, 0.375, 0.25)
#: Sizes of the draft that are tried, as a share of the FP16 weights.
BUDGETS = (0.23, 0.26, 0.29, 0.31, 0.34)

_SPLITS = (1, 2, 3)
_SCALING_STRENGTHS = (0.0, 0.25, 0.5)
_SAMPLE_ROWS = 128  # of a tensor, on which its channels and split are chosen
_DIAGONAL_SHARE = 0.1  # of the moment's off-diagonal that is distrusted: it is a finite sample's
_SWEEPS = 2
_SPARE_CHOICES = 4  # choices beyond those verified, for vocabularies of other sizes
_EXPECTED_PART = 0.5  # of the head, with which its bits count in a budget
_SEGMENTS = 3  # parts of the model, by depth, whose sensitivities are measured apart
_SENSITIVITY_TOKENS = 320
# Inputs that several layers share.
_SOURCE = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much
# What is known so far, as JSON values: an interrupted run goes on from it.
Journal = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the optimiser knows about a model's use.

    Attributes
    ----------
    texts : the target's greedy continuations of calibration prompts
    inputs : float16 [T, K] by linear layer
        Of all passes that a draft could have made: not of the prompts, whose first token has
        activations in many models that are hundreds of times larger than all others.
    """

    texts: list[Text]
    inputs: dict[str, torch.Tensor] = field(repr=False)

    def moment(self, name: str) -> torch.Tensor:
        """Second moment float32 [K, K] of a layer's inputs, its off-diagonal shrunk.

        Every input counts alike, whatever its size.
        """
        x = self.inputs[_shared_input(name)].to(torch.float32).nan_to_num(0.0, 0.0, 0.0)
        x = x / x.square().mean(dim=1, keepdim=True).sqrt().clamp(min=torch.finfo().tiny)
        moment = (x.T @ x) / len(x)
        diagonal = torch.diagonal(moment).clone()
        moment *= 1 - _DIAGONAL_SHARE
        return moment.diagonal_scatter(diagonal)


@dataclass(frozen=True)
class Option:
    """A way to encode a tensor.

    Attributes
    ----------
    config : FormatConfig
    scaling : strength of the channel scaling, 0 for none
    permute : whether channels are ordered
    error : relative error of the drafted outputs
    bits : bits that a draft pass reads
    """

    config: FormatConfig
    scaling: float
    permute: bool
    error: float
    bits: int


@dataclass(frozen=True)
class OptimisedEncoding:
    """An optimised encoding.

    Attributes
    ----------
    tensors : encoded linear layers by name
    chain, alternates : settings that were best on the calibration texts without alternates and with
    speedups : modelled speedup on the calibration texts with each of the two
    tried : for every budget tried, draft cost and the two speedups
    """

    tensors: dict[str, EncodedTensor] = field(repr=False)
    chain: Settings
    alternates: Settings
    speedups: tuple[float, float]
    tried: list[tuple[float, float, float]]


def calibrate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    texts: Sequence[Sequence[int]] | None = None,
) -> Calibration:
    """Decode calibration prompts and collect the inputs of all linear layers.

    Parameters
    ----------
    texts : continuations found earlier, optional
        They are taken instead of decoding.

    Raises
    ------
    ValueError
        If there are no prompts, or one is empty or too long for the model.
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    target = float_linear(float_weights(model))
    if texts is None:
        decoded = decode(model, prompts, max_tokens, target, model.tokenizer.stop_ids)
        texts = [text.tokens for text in decoded]
    inputs: dict[str, list[torch.Tensor]] = {}
    result = []
    for prompt, tokens in zip(prompts, texts, strict=True):

        def collect(name: str, x: torch.Tensor, skip: int = len(prompt) - 1) -> torch.Tensor:
            if _shared_input(name) == name:
                inputs.setdefault(name, []).append(x[skip:])
            return target(name, x)

        _, keys, values = prefill(model, [*prompt, *tokens[:-1]], collect)
        result.append(Text(list(prompt), list(tokens), keys, values))
    return Calibration(result, {name: torch.cat(rows) for name, rows in inputs.items()})


def _shared_input(name: str) -> str:
    """The first of the layers that have the same input."""
    prefix, dot, last = name.rpartition(".")
    return prefix + dot + _SOURCE.get(last, last)


def channel_shift(weights: torch.Tensor, power: torch.Tensor, strength: float) -> np.ndarray:
    """Exponents, uint8 [K], that scale weights [O, K] by (rms of input)^strength, about.

    They count from the least scaled channel and are limited so that no finite weight leaves FP16's
    range. `power` is the mean square of each input.
    """
    level = torch.log2(power.clamp(min=2.0**-40)) * (strength / 2)
    rise = torch.round(level - level.median()).clamp(-(MAX_SHIFT // 2), MAX_SHIFT - MAX_SHIFT // 2)
    fields = (weights.view(torch.int16) >> 10) & 31
    room = 30 - torch.where(fields == 31, 0, fields).amax(dim=0)
    return torch.minimum(rise - rise.min(), room).clamp(0, MAX_SHIFT).numpy().astype(np.uint8)


def channel_order(weights: torch.Tensor) -> np.ndarray:
    """Permutation, uint16 [K], by rising energy of the weights [O, K] of an input channel."""
    energy = weights.to(torch.float32).nan_to_num(0.0, 0.0, 0.0).square().sum(dim=0)
    return torch.sort(energy, stable=True).indices.numpy().astype(np.uint16)


def channels(
    weights: torch.Tensor, power: torch.Tensor, scaling: float, permute: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Order and shift of the input channels of weights [O, K], each None if not asked for."""
    k = weights.shape[1]
    shift = channel_shift(weights, power, scaling) if scaling else None
    if shift is not None and not shift.any():
        shift = None
    order = None
    if permute and k <= 1 << 16:
        order = channel_order(arranged(weights, shift=shift))
        shift = None if shift is None else shift[order]
    return order, shift


def arranged_moment(
    moment: torch.Tensor, order: np.ndarray | None, shift: np.ndarray | None
) -> torch.Tensor:
    """Second moment [K, K] of inputs that are permuted and scaled like the weights, inversely."""
    if order is not None:
        index = torch.from_numpy(order.astype(np.int64))
        moment = moment[index][:, index]
    if shift is not None:
        scale = torch.from_numpy(np.exp2(-shift.astype(np.float32)))
        moment = moment * scale[:, None] * scale
    return moment


def unit_levels(weights: torch.Tensor, config: FormatConfig) -> torch.Tensor:
    """Draft values float32 [O, K] of arranged weights at scale 1; 0 in groups with inf or NaN."""
    codes = np.full((weights.shape[0], -(-weights.shape[1] // config.group)), UNIT_SCALE_CODE)
    return encode(weights, config, codes, columns=len(weights)).draft().nan_to_num_(0.0)


def fit_scales(
    weights: torch.Tensor, levels: torch.Tensor, moment: torch.Tensor, group: int, sweeps: int
) -> torch.Tensor:
    """Scale codes int64 [O, groups] that minimise tr(E M E^T), E = weights - scales * levels.

    Each group's best scale on its own comes first; then `sweeps` rounds of coordinate descent, in
    which the error is a parabola in each scale, so that the code nearest to its vertex is best.
    weights and levels are float32 [O, K], moment [K, K].
    """
    numerators = torch.tensor(SCALE_NUMERATORS, dtype=torch.float32)
    scales = numerators / SCALE_DENOMINATOR
    bounds = (scales[1:] + scales[:-1]) / 2
    groups = -(-weights.shape[1] // group)
    codes = torch.full((len(weights), groups), UNIT_SCALE_CODE)
    residual = weights - levels
    for sweep in range(sweeps + 1):
        for g in range(groups):
            part = slice(g * group, (g + 1) * group)
            level, inner = levels[:, part], moment[part, part]
            # First round: as if the other groups had no error.
            pull = residual[:, part] @ inner if sweep == 0 else residual @ moment[:, part]
            energy = ((level @ inner) * level).sum(dim=1)
            now = scales[codes[:, g]]
            vertex = now + (pull * level).sum(dim=1) / energy
            new = torch.bucketize(torch.where(energy > 0, vertex, now), bounds)
            residual[:, part] -= level * (scales[new] - now)[:, None]
            codes[:, g] = new
    return codes


def relative_error(weights: torch.Tensor, drafted: torch.Tensor, moment: torch.Tensor) -> float:
    """Energy of the error of the outputs over that of the outputs: tr(E M E^T) / tr(W M W^T)."""
    error = weights - drafted
    energy = ((weights @ moment) * weights).sum()
    return float(((error @ moment) * error).sum() / energy.clamp(min=torch.finfo().tiny))


def _apply_scales(levels: torch.Tensor, codes: torch.Tensor, group: int) -> torch.Tensor:
    scales = torch.tensor(SCALE_NUMERATORS, dtype=torch.float32)[codes] / SCALE_DENOMINATOR
    return levels * scales.repeat_interleave(group, dim=1)[:, : levels.shape[1]]


def _finite(weights: torch.Tensor) -> torch.Tensor:
    return weights.to(torch.float32).nan_to_num(0.0, 0.0, 0.0)


def options(weights: torch.Tensor, moment: torch.Tensor, group: int, columns: int) -> list[Option]:
    """For each draft width the ways to encode a tensor float16 [O, K] that can be best.

    Errors are measured on a sample of its rows. Bits count padding, group bytes, order and shift.
    """
    o, k = weights.shape
    rows = torch.linspace(0, o - 1, min(o, _SAMPLE_ROWS)).round().to(torch.int64)
    sample, power = weights[rows], torch.diagonal(moment)
    found = []
    for scaling, permute in product(_SCALING_STRENGTHS, (False, True)):
        # From all rows, as the final encoding chooses them.
        order, shift = channels(weights, power, scaling, permute)
        stored, inner = arranged(sample, order, shift), arranged_moment(moment, order, shift)
        exact = _finite(stored)
        for width, split in product(DRAFT_WIDTHS, _SPLITS):
            config = FormatConfig(group, split, width)
            levels = unit_levels(stored, config)
            codes = fit_scales(exact, levels, inner, group, sweeps=0)
            error = relative_error(exact, _apply_scales(levels, codes, group), inner)
            words = 2 * draft_words(k, config) + -(-k // group)
            extra = (2 * k if order is not None else 0) + (k if shift is not None else 0)
            bits = 8 * (words * -(-o // columns) * columns + extra)
            found.append(Option(config, scaling, permute, error, bits))
    return _undominated(found)


def _undominated(found: Sequence[Option]) -> list[Option]:
    """The options with less error than all that take as few bits."""
    kept: list[Option] = []
    for option in sorted(found, key=lambda option: (option.bits, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def encode_option(
    weights: torch.Tensor,
    moment: torch.Tensor,
    option: Option,
    name: str,
    columns: int,
    drafted_outputs: int | None = None,
) -> EncodedTensor:
    """Encode a tensor in the chosen way, its scale codes fitted with the whole second moment."""
    order, shift = channels(weights, torch.diagonal(moment), option.scaling, option.permute)
    stored, group = arranged(weights, order, shift), option.config.group
    inner = arranged_moment(moment, order, shift)
    levels = unit_levels(stored, option.config)
    codes = fit_scales(_finite(stored), levels, inner, group, _SWEEPS)
    return encode(
        weights, option.config, codes.numpy(), name, columns,
        order=order, shift=shift, drafted_outputs=drafted_outputs,
    )  # fmt: skip


def segments(model: Model) -> dict[str, list[str]]:
    """Linear layers whose sensitivity is measured together: of one kind and of like depth."""
    parts: dict[str, list[str]] = {}
    for name in linear_names(model.config):
        if name == "head":
            parts[name] = [name]
        else:
            _, block, kind = name.split(".")
            depth = int(block) * _SEGMENTS // model.config.blocks
            parts.setdefault(f"{kind} of part {depth + 1}", []).append(name)
    return parts


def sensitivities(
    model: Model,
    calibration: Calibration,
    drafted: Mapping[str, EncodedTensor],
    errors: Mapping[str, float],
    known: Mapping[str, float],
) -> Iterator[tuple[str, float]]:
    """What a unit of error does: yields (segment, divergence per unit of relative error).

    The divergence is the mean Kullback-Leibler divergence, in nats, of the model with only this
    segment drafted from the target, over the first tokens of the calibration texts. `known` are
    segments to be left out.
    """
    target = float_linear(float_weights(model))
    texts = list(_first_tokens(calibration.texts, _SENSITIVITY_TOKENS))
    wanted = [prefill(model, tokens, target)[0].log_softmax(dim=1) for tokens in texts]
    for segment, names in segments(model).items():
        if segment in known:
            continue
        linear = draft_linear({name: drafted[name] for name in names}, target)
        total = count = 0
        for tokens, reference in zip(texts, wanted, strict=True):
            ours = prefill(model, tokens, linear)[0].log_softmax(dim=1)
            total += float((reference.exp() * (reference - ours)).sum())
            count += len(tokens)
        unit = sum(errors[name] for name in names)
        yield segment, max(0.0, total / count) / unit if unit else 0.0


def _first_tokens(texts: Sequence[Text], count: int) -> Iterator[list[int]]:
    """Texts, and of the last one as much as fits, that have `count` tokens together."""
    for text in texts:
        tokens = [*text.prompt, *text.tokens][:count]
        if tokens:
            yield tokens
        count -= len(tokens)


def allocate(
    options_of: Mapping[str, Sequence[Option]], weight: Mapping[str, float], budget: float
) -> dict[str, Option]:
    """The options with the least divergence, sum of weight * error, whose bits are about `budget`.

    Each tensor minimises weight * error + price * bits; the price is found by bisection. Bits are
    at most the budget, unless every tensor takes its smallest option.
    """

    def best(price: float) -> dict[str, Option]:
        return {
            name: min(some, key=lambda o: (weight[name] * o.error + price * o.bits, o.bits))
            for name, some in options_of.items()
        }

    low, high = -60.0, 0.0  # log2 of the price
    for _ in range(40):
        middle = (low + high) / 2
        if sum(option.bits for option in best(2.0**middle).values()) > budget:
            low = middle
        else:
            high = middle
    return best(2.0**high)


def restrict_vocabulary(chains: Chains, count: int, choices: int) -> Chains:
    """What chains would be if the head drafted only the lowest `count` token ids.

    Behind a first choice that would have been another one the chain is not known: it is taken not
    to match anything there.
    """
    allowed = chains.choices < count
    # Stable: what is allowed keeps its order and comes first.
    index = (~allowed).to(torch.int8).sort(dim=2, stable=True).indices[..., :choices]
    kept, scores = chains.choices.gather(2, index), chains.scores.gather(2, index)
    missing = ~allowed.gather(2, index)
    known = allowed[..., 0].cummin(dim=1).values.roll(1, dims=1)
    known[:, 0] = True
    kept = torch.where(known[..., None] & ~missing, kept, -1)
    # A missing choice is infinitely far below the best, but the best itself is always finite.
    scores = scores.masked_fill(missing & (torch.arange(scores.shape[2]) > 0), -torch.inf)
    return Chains(kept, scores)


def best_speedup(
    texts: Sequence[Text], chains: Sequence[Chains], costs: Costs, rows: int, choices: int
) -> tuple[float, Settings]:
    """The largest modelled speedup of greedy speculation along the texts, and its settings."""
    samples = [Sample("calibration", *pair) for pair in zip(texts, chains, strict=True)]
    shortest = max(1, rows // 2)  # to save time: the threshold ends drafts that should be short
    settings = best_settings(samples, costs, rows, choices, _THRESHOLDS, shortest)
    return speedup(samples, settings, costs), settings


def optimise(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    group: int = 64,
    columns: int = 16,
    rows: int = 8,
    choices: int = 4,
    max_tokens: int = 96,
    journal: Journal | None = None,
    save: Callable[[Journal], None] = lambda journal: None,
    progress: Progress = lambda what, done, total: None,
) -> OptimisedEncoding:
    """Find the encoding of all linear layers whose drafts make decoding fastest.

    Parameters
    ----------
    prompts : token ids of calibration prompts
    group, columns : of the format, for all tensors
    rows, choices : of the verify pass (`Settings`) that speeds are modelled for
    max_tokens : length of the calibration texts
    journal : of an earlier run with the same arguments, to go on from
    save : called with the journal whenever it has grown

    Raises
    ------
    ValueError
        If an argument is impossible.
    """
    journal = {} if journal is None else journal

    def note(key: str, value: Any, part: str | None = None) -> None:
        if part is None:
            journal[key] = value
        else:
            journal.setdefault(key, {})[part] = value
        save(journal)

    progress("decoding calibration texts", 0, 1)
    calibration = calibrate(model, prompts, max_tokens, journal.get("texts"))
    note("texts", [text.tokens for text in calibration.texts])

    names = linear_names(model.config)
    options_of: dict[str, list[Option]] = {}
    for i, name in enumerate(names):
        progress("trying formats", i, len(names))
        known = journal.get("options", {}).get(name)
        if known is None:
            found = options(model.linear_weight(name), calibration.moment(name), group, columns)
            note("options", [asdict(option) for option in found], name)
            known = journal["options"][name]
        options_of[name] = [_option(entry) for entry in known]

    encoded: dict[tuple[str, Option], EncodedTensor] = {}

    def encode_all(chosen: Mapping[str, Option], label: str) -> dict[str, EncodedTensor]:
        for i, (name, option) in enumerate(chosen.items()):
            progress(label, i, len(chosen))
            if (name, option) not in encoded:
                weights, moment = model.linear_weight(name), calibration.moment(name)
                encoded[name, option] = encode_option(weights, moment, option, name, columns)
        return {name: encoded[name, option] for name, option in chosen.items()}

    weight = dict(journal.get("sensitivities", {}))
    parts = segments(model)
    if len(weight) < len(parts):
        narrow = {  # the most exact option of 4 bits
            name: min((o for o in some if o.config.width == 4), key=lambda o: o.error)
            for name, some in options_of.items()
        }
        drafted = encode_all(narrow, "encoding at 4 bits")
        errors = {name: option.error for name, option in narrow.items()}
        for segment, value in sensitivities(model, calibration, drafted, errors, weight):
            weight[segment] = value
            note("sensitivities", value, segment)
            progress("measuring sensitivities", len(weight), len(parts))
    of_tensor = {name: weight[part] for part, members in parts.items() for name in members}

    trials = journal.get("trials", {})
    tried: list[tuple[dict[str, Option], dict[str, float]]] = []  # budgets may allow the same
    for i, budget in enumerate(BUDGETS):
        progress("trying sizes", i, len(BUDGETS))
        if str(budget) in trials:
            continue
        chosen = _allocate(model, options_of, of_tensor, budget)
        tensors = encode_all(chosen, "encoding")
        progress("trying sizes", i, len(BUDGETS))
        result = next((result for other, result in tried if other == chosen), None)
        if result is None:
            result = _trial(model, calibration.texts, tensors, rows, choices)
            tried.append((chosen, result))
        note("trials", result, str(budget))
        trials = journal["trials"]

    budget, part = _best_trial(trials)
    chosen = _allocate(model, options_of, of_tensor, budget)
    tensors = encode_all(chosen, "encoding")
    if part < 1:
        head = tensors["head"]
        count = round(head.shape[0] * part)
        tensors["head"] = replace(head, drafted_outputs=max(rows, count // columns * columns))
    progress("choosing settings", 0, 1)
    chains = draft_chains(model, calibration.texts, draft_linear(tensors), rows - 1, choices)
    costs = encoded_costs(model.config, tensors)
    chain, alternates = (
        best_speedup(calibration.texts, chains, costs, rows, n) for n in (1, choices)
    )
    results = [(entry["cost"], entry["chain"], entry["alternates"]) for entry in trials.values()]
    return OptimisedEncoding(tensors, chain[1], alternates[1], (chain[0], alternates[0]), results)


def _option(entry: Mapping[str, Any]) -> Option:
    return Option(**{**entry, "config": FormatConfig(**entry["config"])})


def _allocate(
    model: Model,
    options_of: Mapping[str, Sequence[Option]],
    weight: Mapping[str, float],
    budget: float,
) -> dict[str, Option]:
    """`allocate` for a share of the FP16 weights, the head's bits counted in part."""
    size = 16 * sum(model.linear_weight(name).numel() for name in options_of)
    head = [
        replace(option, bits=int(option.bits * _EXPECTED_PART)) for option in options_of["head"]
    ]
    chosen = allocate({**options_of, "head": head}, weight, budget * size)
    return {**chosen, "head": options_of["head"][head.index(chosen["head"])]}


def _trial(
    model: Model,
    texts: Sequence[Text],
    tensors: Mapping[str, EncodedTensor],
    rows: int,
    choices: int,
) -> dict[str, float]:
    """Best speedups that encoded tensors reach on the texts, over parts of the vocabulary."""
    vocabulary = tensors["head"].shape[0]
    kept = min(vocabulary, choices + _SPARE_CHOICES)
    chains = draft_chains(model, texts, draft_linear(tensors), rows - 1, kept)
    best = {"alternates": 0.0}
    for part in HEAD_PARTS:
        drafted = max(1, round(vocabulary * part))
        head = replace(tensors["head"], drafted_outputs=drafted)
        costs = encoded_costs(model.config, {**tensors, "head": head})
        some = [restrict_vocabulary(c, drafted, choices) for c in chains]
        alternates = best_speedup(texts, some, costs, rows, choices)[0]
        if alternates > best["alternates"]:
            chain = best_speedup(texts, some, costs, rows, 1)[0]
            cost = costs.relative[0]
            best = {"cost": cost, "part": part, "chain": chain, "alternates": alternates}
    return best


def _best_trial(trials: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Budget and part of the vocabulary with the best speedup."""
    budget = max(trials, key=lambda budget: trials[budget]["alternates"])
    return float(budget), trials[budget]["part"]
