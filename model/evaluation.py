# SPDX-License-Identifier: Apache-2.0
"""What speculation is worth: figures of drafts on texts, by kind of text, with their uncertainty.

The texts are the FP16 target's own greedy replies, so what speculation with given settings would do
along them can be looked up (`speq.model.emulation`). Speeds are modelled: a pass costs the bytes
that it streams (`speq.model.cycles`), everything counted, with and without KV traffic; a speedup is
the cost of decoding the same tokens plainly over that of the draft and verify passes. Confidence
intervals are percentiles of the bootstrap over prompts (Efron, "Bootstrap Methods: Another Look at
the Jackknife", Annals of Statistics 7, 1979).

Longest draft and threshold are chosen on other prompts (calibration) than those whose figures are
reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np
import torch

from speq.model.checkpoint import ModelConfig
from speq.model.cycles import (
    Engine,
    Formats,
    draft_pass,
    kv_bytes,
    linear_shapes,
    plain_pass,
    verify_pass,
)
from speq.model.draft_tree import chain_ends
from speq.model.emulation import Chains, Text, replay
from speq.model.format import EncodedTensor
from speq.model.pass_cycles import PassCycles
from speq.model.speculation import Settings, Statistics, Step

#: Early-exit thresholds, in logits, that `best_settings` tries.
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)  # percentiles of the 95 % confidence interval


@dataclass(frozen=True)
class Costs:
    """Bytes of weights and group bytes that each pass streams.

    Attributes
    ----------
    config : of the target, for KV traffic
    plain, draft, verify : float
        Bytes of a plain FP16 pass, a draft pass and a verify pass.
    """

    config: ModelConfig
    plain: float
    draft: float
    verify: float

    @property
    def relative(self) -> tuple[float, float]:
        """Costs of a draft and of a verify pass in units of a plain pass."""
        return self.draft / self.plain, self.verify / self.plain


def counted_costs(
    config: ModelConfig,
    formats: Formats,
    engine: Engine | None = None,
    drafted_outputs: int | None = None,
) -> Costs:
    """Costs with everything counted; layers without a format are drafted in FP16."""
    engine = engine or Engine()
    plain = plain_pass(config, engine)
    draft = draft_pass(config, engine, formats, drafted_outputs=drafted_outputs)
    verify = verify_pass(config, engine, formats, 1)
    return Costs(
        config, plain.weights, draft.weights + draft.groups, verify.weights + verify.groups
    )


def encoded_costs(
    config: ModelConfig, encoded: Mapping[str, EncodedTensor], reranked: int = 0
) -> Costs:
    """Costs of an encoded model with everything counted.

    Layers that are not encoded are read in FP16 by every pass. For each of `reranked` tokens a
    draft pass reads the whole tile of the head that has it, as if no two were in the same.
    """
    plain = {name: 2 * o * k for name, (o, k) in linear_shapes(config).items()}
    other = sum(size for name, size in plain.items() if name not in encoded)
    tile = 0
    if reranked and "head" in encoded:
        head = encoded["head"]
        outputs = -(-head.shape[0] // head.columns) * head.columns
        tile = head.storage_bits() // 8 * head.columns // outputs
    return Costs(
        config,
        plain=sum(plain.values()),
        draft=other
        + sum(tensor.draft_bits() for tensor in encoded.values()) // 8
        + reranked * tile,
        verify=other + sum(tensor.storage_bits() for tensor in encoded.values()) // 8,
    )


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt's text and the chains that a draft proposes along it.

    Attributes
    ----------
    kind : of text, "chat" for example
    text : Text
    chains : Chains
    """

    kind: str
    text: Text
    chains: Chains


@dataclass(frozen=True)
class Run:
    """What speculation did on one text.

    Attributes
    ----------
    kind : str
    statistics : Statistics
    early_exits : chains that ended because of a margin or a cost, before their longest length
    matches, positions : tokens that equal the draft's first choice behind the true text; tokens
    plain, spent : bytes of plain and of speculative decoding, weights and group bytes
    plain_kv, spent_kv : the same with KV traffic
    """

    kind: str
    statistics: Statistics
    early_exits: int
    matches: int
    positions: int
    plain: float
    spent: float
    plain_kv: float
    spent_kv: float


def run_sample(sample: Sample, settings: Settings, costs: Costs) -> Run:
    """Replay speculation along one text."""
    statistics = Statistics()
    exits = 0
    kv_plain = kv_spent = 0
    context = len(sample.text.prompt) - 1  # the cache holds every committed token but the last
    for step in replay(sample.text, sample.chains, settings):
        statistics.add(step)
        exits += _ended_early(step, settings)
        traffic = _kv_traffic(costs.config, step, context)
        kv_plain, kv_spent = kv_plain + traffic[0], kv_spent + traffic[1]
        context += len(step.tokens)
    plain = statistics.committed * costs.plain
    spent = statistics.draft_passes * costs.draft + statistics.verify_passes * costs.verify
    first = sample.chains.choices[:, 0, 0]
    matches = int((first == torch.tensor(sample.text.tokens)).sum())
    return Run(
        *(sample.kind, statistics, exits, matches, len(first)),
        *(plain, spent, plain + kv_plain, spent + kv_spent),
    )


@dataclass(frozen=True)
class PassCosts:
    """What passes cost behind a context of fixed length, in any unit.

    Attributes
    ----------
    plain, draft : float
    verify : list of float
        Of verify passes of 1, 2, ... rows.
    step : float
        What a step costs besides its passes.
    """

    plain: float
    draft: float
    verify: Sequence[float]
    step: float = 0.0


def byte_costs(costs: Costs, rows: int, context: int) -> PassCosts:
    """Bytes of passes of up to `rows` rows behind `context` positions, KV traffic included."""
    config = costs.config
    return PassCosts(
        costs.plain + kv_bytes(config, context, 1),
        costs.draft + kv_bytes(config, context, 1),
        [costs.verify + kv_bytes(config, context, row) for row in range(1, rows + 1)],
    )


def cycle_costs(
    cycles: PassCycles, context: int, reranked: int = 0, searched: int = 0
) -> PassCosts:
    """Cycles of passes of an accelerator behind `context` positions, everything included.

    Parameters
    ----------
    cycles : PassCycles
        Its rows are those of the largest verify pass.
    reranked : as of `Settings`, each in its own tile
    searched : tokens of the history, 0 if nothing is guessed
        A step searches it twice while no pass is under way: behind the root and behind the last
        drafted token.
    """
    return PassCosts(
        cycles.plain(context),
        cycles.draft(context, reranked),
        [cycles.verify(row, context) for row in range(1, cycles.rows + 1)],
        step=2 * min(searched, context),
    )


def speedup_at(
    samples: Sequence[Sample], settings: Settings, costs: PassCosts, seed: int
) -> Estimate:
    """Modelled speedup over plain decoding if every pass cost as much as behind one context."""
    plain, spent = np.zeros(len(samples)), np.zeros(len(samples))
    for i, sample in enumerate(samples):
        for step in replay(sample.text, sample.chains, settings):
            plain[i] += len(step.tokens) * costs.plain
            spent[i] += step.drafted * costs.draft + costs.verify[step.rows - 1] + costs.step
    return bootstrap_ratio(plain, spent, seed)


def _ended_early(step: Step, settings: Settings) -> bool:
    ended = bool(step.margins) and chain_ends(settings.policy, settings.threshold, step.margins)
    return ended and step.drafted < settings.length


def _kv_traffic(config: ModelConfig, step: Step, context: int) -> tuple[int, int]:
    """Bytes of KV traffic of decoding a step's tokens plainly, and of the step."""
    plain = sum(kv_bytes(config, context + i, 1) for i in range(len(step.tokens)))
    drafts = sum(kv_bytes(config, context + i, 1) for i in range(step.drafted))
    return plain, drafts + kv_bytes(config, context, step.rows)


def speedup(samples: Sequence[Sample], settings: Settings, costs: Costs) -> float:
    """Modelled speedup over all samples, without KV traffic."""
    statistics = Statistics()
    for sample in samples:
        for step in replay(sample.text, sample.chains, settings):
            statistics.add(step)
    return statistics.speedup(*costs.relative)


def best_settings(
    samples: Sequence[Sample],
    costs: Costs,
    rows: int = 8,
    choices: int = 4,
    thresholds: Sequence[float] = THRESHOLDS,
    shortest: int = 1,
    reranked: int = 0,
) -> Settings:
    """Longest draft and threshold with the highest speedup on these (calibration) samples.

    Drafts of `shortest` to rows - 1 tokens, but no longer than the samples' chains, are tried; of
    equal ones the first wins. `reranked` is what the samples were drafted with. Raises ValueError
    if there are no samples.
    """
    if not samples:
        raise ValueError("no texts to choose settings on")
    longest = min(rows - 1, samples[0].chains.choices.shape[1])
    options = [
        Settings(rows, length, threshold, choices, reranked)
        for length, threshold in product(range(shortest, longest + 1), thresholds)
    ]
    return max(options, key=lambda settings: speedup(samples, settings, costs))


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """Figures of some runs; NaN where nothing was there to be counted.

    Attributes
    ----------
    prompts, tokens : int
        How many were decoded.
    match_rate : share of tokens that equal the draft's first choice behind the true text
    acceptance_rate : share of the compared chain tokens that were accepted
    acceptance_length : accepted chain tokens per verify pass
    tokens_per_pass : tokens committed per verify pass
    drafted : chain tokens per verify pass
    early_exits : share of verify passes whose chain ended because of a margin or a cost
    alternate_hits : share of verify passes in which an alternate was accepted
    guess_hits : accepted tokens that were guessed from earlier text, per verify pass
    free_steps : share of verify passes without a draft pass before them, because of a guess
    speedup, speedup_kv : over plain FP16 decoding; without and with KV traffic
    """

    prompts: int
    tokens: int
    match_rate: float
    acceptance_rate: float
    acceptance_length: float
    tokens_per_pass: float
    drafted: float
    early_exits: float
    alternate_hits: float
    guess_hits: float
    free_steps: float
    speedup: Estimate
    speedup_kv: Estimate


def figures(runs: Sequence[Run], seed: int) -> Figures:
    """Figures over runs; `seed` is that of the bootstrap."""
    total = Statistics()
    for run in runs:
        for name, value in asdict(run.statistics).items():
            setattr(total, name, getattr(total, name) + value)
    passes = total.verify_passes
    bytes_ = np.array([(r.plain, r.spent, r.plain_kv, r.spent_kv) for r in runs], np.float64)
    return Figures(
        prompts=len(runs),
        tokens=total.committed,
        match_rate=_ratio(sum(r.matches for r in runs), sum(r.positions for r in runs)),
        acceptance_rate=total.match_rate,
        acceptance_length=_ratio(total.accepted, passes),
        tokens_per_pass=total.tokens_per_pass,
        drafted=_ratio(total.draft_passes, passes),
        early_exits=_ratio(sum(r.early_exits for r in runs), passes),
        alternate_hits=_ratio(total.alternate_hits, passes),
        guess_hits=_ratio(total.guess_hits, passes),
        free_steps=_ratio(total.free_steps, passes),
        speedup=bootstrap_ratio(bytes_[:, 0], bytes_[:, 1], seed),
        speedup_kv=bootstrap_ratio(bytes_[:, 2], bytes_[:, 3], seed),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def bootstrap_ratio(over: np.ndarray, under: np.ndarray, seed: int) -> Estimate:
    """sum(over) / sum(under) of paired values [N], and its interval by resampling the pairs."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(over), (RESAMPLES, len(over)))
    ratios = over[chosen].sum(axis=1) / under[chosen].sum(axis=1)
    low, high = np.percentile(ratios, _INTERVAL)
    return Estimate(float(over.sum() / under.sum()), float(low), float(high))


def by_kind(
    samples: Sequence[Sample], settings: Settings, costs: Costs, seed: int
) -> dict[str, Figures]:
    """Figures of each kind of text, in the order of their first sample, and of all ("all")."""
    runs = [run_sample(sample, settings, costs) for sample in samples]
    result = {
        kind: figures([run for run in runs if run.kind == kind], seed)
        for kind in dict.fromkeys(run.kind for run in runs)
    }
    return result | {"all": figures(runs, seed)}


@dataclass(frozen=True)
class Acceptance:
    """Acceptance by draft position, of chains without early exit.

    Attributes
    ----------
    reached : how many chains were right before each position (and had a target token there)
    first : of these, the share whose first choice is the target's token
    among : shares whose first 2 and first 4 choices, as far as they were kept, hold it
    survival : share of all chains that are right up to and including each position
    """

    reached: list[int]
    first: list[float]
    among: dict[int, list[float]]
    survival: list[float]


def acceptance_by_position(samples: Sequence[Sample]) -> Acceptance:
    """How the draft's chance of being right falls along a chain."""
    _, length, kept = samples[0].chains.choices.shape
    reached, started = np.zeros(length, int), np.zeros(length, int)
    hits = np.zeros((length, kept), int)  # chains whose choice c, and no other, is the target's
    for sample in samples:
        tokens = torch.tensor(sample.text.tokens)
        count = len(tokens)
        for j in range(min(length, count)):
            # Chain p meets its target token p + j at position j.
            choices = sample.chains.choices[: count - j]
            right = choices[:, j] == tokens[j:, None]
            alive = torch.ones(count - j, dtype=torch.bool)
            for i in range(j):
                alive &= choices[:, i, 0] == tokens[i : i + count - j]
            reached[j] += int(alive.sum())
            started[j] += count - j
            hits[j] += right[alive].sum(dim=0).numpy()
    shares = hits.cumsum(axis=1)
    return Acceptance(
        reached=reached.tolist(),
        first=[_ratio(int(h), int(n)) for h, n in zip(shares[:, 0], reached, strict=True)],
        among={
            c: [_ratio(int(h), int(n)) for h, n in zip(shares[:, c - 1], reached, strict=True)]
            for c in (2, 4)
            if c <= kept
        },
        survival=[_ratio(int(h), int(n)) for h, n in zip(shares[:, 0], started, strict=True)],
    )


@dataclass(frozen=True)
class Curve:
    """Speedup against one setting, whose name it has; `chosen` is the value in use."""

    setting: str
    values: Sequence[float]
    speedups: list[float]
    chosen: float


def length_curve(samples: Sequence[Sample], settings: Settings, costs: Costs) -> Curve:
    """Speedup against the longest draft, from 1 to what rows and chains allow."""
    longest = min(settings.rows - 1, samples[0].chains.choices.shape[1])
    lengths = list(range(1, longest + 1))
    options = [replace(settings, draft_length=length) for length in lengths]
    speeds = [speedup(samples, option, costs) for option in options]
    return Curve("longest draft", lengths, speeds, settings.length)


def threshold_curve(samples: Sequence[Sample], settings: Settings, costs: Costs) -> Curve:
    """Speedup against the early-exit threshold."""
    options = [replace(settings, threshold=threshold) for threshold in THRESHOLDS]
    speeds = [speedup(samples, option, costs) for option in options]
    return Curve("early-exit threshold", list(THRESHOLDS), speeds, settings.threshold)


def exponent_counts(weights: torch.Tensor, group: int) -> np.ndarray:
    """Numbers of weights by t, the group's base exponent minus the weight's exponent, and by the
    top mantissa bit: int64 [32, 2]. Weights are float16 [O, K], groups as in `speq.model.format`.
    """
    patterns = weights.contiguous().numpy().view(np.uint16)
    rows, k = patterns.shape
    exponent = np.full((rows, -(-k // group) * group), -1, np.int8)
    exponent[:, :k] = patterns >> 10 & 31
    grouped = exponent.reshape(rows, -1, group)
    t = (grouped.max(axis=2, keepdims=True) - grouped).reshape(rows, -1)[:, :k]
    half = patterns >> 9 & 1
    counts = np.bincount((2 * t.astype(np.int64) + half).reshape(-1), minlength=64)
    return counts.reshape(32, 2)
