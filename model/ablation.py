# SPDX-License-Identifier: Apache-2.0
"""The ablation: what each part of the draft format is worth, and what other schemes reach.

`ROWS` lists what is compared; a new row takes one line there, and one in `DRAFTS` if it needs a
draft that no other row uses. The figures under `prototype` are those of the project's design study
on other prompts, with chains of up to 16 tokens. Each row's longest draft and threshold are chosen
on calibration texts.

Rows that are not `counted` take a draft pass as a quarter of a plain one and leave the LM head in
FP16, as the study did; their `counted_speedup` has the costs of everything that is read. The study
also had drafts of 5 and 6 bits and scaled channels, which are gone: measured on the encoder's
drafts, none of them was worth 3 %.

Schemes from other publications (`speq.model.competitors`) appear twice: as external draft models,
with a KV cache of their own and the storage that they add, and as lossy decoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch

from speq.model.arith import quantize_activations
from speq.model.checkpoint import Model, linear_names
from speq.model.competitors import SCHEMES, ActivationStats, QuantizedModel, quantize_model
from speq.model.emulation import (
    Linear,
    Text,
    decode,
    draft_chains,
    draft_linear,
    logits,
    recache,
    reranked_linear,
)
from speq.model.encoder import collect_inputs, encode_fitted
from speq.model.encoding import encode_linears
from speq.model.evaluation import (
    Costs,
    Estimate,
    Sample,
    best_settings,
    by_kind,
    counted_costs,
    encoded_costs,
)
from speq.model.format import EncodedTensor, encode, fit_scale_codes
from speq.model.number_format import UNIT_SCALE_CODE, FormatConfig
from speq.model.policy_fit import best_policy
from speq.model.speculation import Settings


@dataclass(frozen=True, eq=False)
class Materials:
    """What drafts are made from and measured on.

    Attributes
    ----------
    model : Model
    target : the FP16 model's linear layers
    encoded : the encoding that is evaluated
    stats : of the inputs of every linear layer on the calibration texts
    calibration, evaluation : (kind, text) of each text
    stop_ids : tokens that end a text
    max_tokens : longest text
    reranked : best tokens of the evaluated encoding whose logits are computed exactly
    """

    model: Model
    target: Linear
    encoded: Mapping[str, EncodedTensor]
    stats: dict[str, ActivationStats]
    calibration: list[tuple[str, Text]]
    evaluation: list[tuple[str, Text]]
    stop_ids: frozenset[int]
    max_tokens: int
    reranked: int = 0


@dataclass(frozen=True, eq=False)
class Draft:
    """A draft model.

    Attributes
    ----------
    linear : its linear layers
    costs : with everything counted
    external : it has a KV cache of its own, and its weights are stored beside the target's
    quantized : the model in another scheme, if it is one
    reranked : its best tokens whose logits are computed exactly
    """

    linear: Linear
    costs: Costs
    external: bool = False
    quantized: QuantizedModel | None = None
    reranked: int = 0


@dataclass(frozen=True)
class Recipe:
    """How to make a draft that lies inside the FP16 weights of the blocks; the LM head stays FP16.

    Attributes
    ----------
    form : FormatConfig
    scales : "none", "fp16" (a factor per group, rounded to FP16) or "codes" (the format's)
    calibrated : scales weigh the error of input k with the mean of its square
    block_activations : 8-bit block activations instead of FP16 ones
    """

    form: FormatConfig = field(default_factory=FormatConfig)
    scales: str = "fp16"
    calibrated: bool = False
    block_activations: bool = False


def shared_draft(recipe: Recipe, materials: Materials) -> Draft:
    """The draft of a recipe."""
    config = materials.model.config
    formats = dict.fromkeys(linear_names(config), recipe.form)
    del formats["head"]
    weights = {
        name: _draft_weights(materials.model.linear_weight(name), recipe, materials.stats[name])
        for name in formats
    }

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in weights:
            return materials.target(name, x)
        x = quantize_activations(x, recipe.form.group).values() if recipe.block_activations else x
        return x.to(torch.float32) @ weights[name].T

    return Draft(linear, counted_costs(config, formats))


def _draft_weights(weight: torch.Tensor, recipe: Recipe, stats: ActivationStats) -> torch.Tensor:
    """Draft weights float32 [O, K]."""
    form, importance = recipe.form, stats.mean_square if recipe.calibrated else None
    if recipe.scales == "codes":
        return encode(weight, form, fit_scale_codes(weight, form, importance)).draft()
    groups = -(-weight.shape[1] // form.group)
    unit = np.full((len(weight), groups), UNIT_SCALE_CODE)
    levels = encode(weight, form, unit).draft()
    if recipe.scales == "none":
        return levels
    return levels * fitted_scales(weight, levels, form.group, importance)


def fitted_scales(
    weight: torch.Tensor, levels: torch.Tensor, group: int, importance: torch.Tensor | None
) -> torch.Tensor:
    """The factor of every weight's group that minimises the (weighted) squared error of the levels,
    rounded to FP16: float32 [O, K]."""
    factor = torch.ones(weight.shape[1]) if importance is None else importance
    padding = (0, -weight.shape[1] % group)

    def summed(values: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(values * factor, padding)
        return padded.unflatten(1, (-1, group)).sum(dim=2)

    along, energy = summed(weight.to(torch.float32) * levels), summed(levels.square())
    scales = torch.where(energy > 0, along / energy, 1.0).to(torch.float16).to(torch.float32)
    return scales.repeat_interleave(group, dim=1)[:, : weight.shape[1]]


def encoded_draft(materials: Materials) -> Draft:
    """The draft of the encoding that is evaluated."""
    return _draft_of(materials.encoded, materials.reranked, materials)


def built_draft(fitted: bool, reranked: int, part: float, materials: Materials) -> Draft:
    """A draft as the accelerator makes it: scale codes fitted to the calibration inputs or to the
    weights alone, so many of the best tokens re-ranked, a part of the vocabulary drafted."""
    tensors = fitted_tensors(materials) if fitted else encode_linears(materials.model)
    head = tensors["head"]
    tiles = -(-round(head.shape[0] * part) // head.columns)
    drafted = min(head.shape[0], tiles * head.columns)
    tensors = {**tensors, "head": replace(head, drafted_outputs=drafted)}
    return _draft_of(tensors, reranked, materials)


@lru_cache(maxsize=1)
def fitted_tensors(materials: Materials) -> dict[str, EncodedTensor]:
    """All linear layers with scale codes fitted to the calibration texts' inputs."""
    model, texts = materials.model, [text for _, text in materials.calibration]
    calibration = collect_inputs(model, texts, materials.target)
    return {
        name: encode_fitted(
            model.linear_weight(name), calibration.moment(name), FormatConfig(), name, columns=16
        )
        for name in linear_names(model.config)
    }


def _draft_of(tensors: Mapping[str, EncodedTensor], reranked: int, materials: Materials) -> Draft:
    linear = draft_linear(tensors, materials.target)
    if reranked:
        head = materials.model.linear_weight("head").to(torch.float32)
        linear = reranked_linear(linear, head, reranked)
    costs = encoded_costs(materials.model.config, tensors, reranked)
    return Draft(linear, costs, reranked=reranked)


def scheme_draft(name: str, head: bool, external: bool, materials: Materials) -> Draft:
    """A model in one of the competitors' schemes as a draft; without `head` its head is FP16."""
    quantized = quantize_model(materials.model, SCHEMES[name], materials.stats, head)
    plain = quantized.bytes_fp16
    verify = plain if external else plain + quantized.bytes_added
    costs = Costs(materials.model.config, plain, quantized.bytes_streamed, verify)
    return Draft(quantized.linear, costs, external, quantized)


_CALIBRATED = Recipe(calibrated=True)
_CODES = replace(_CALIBRATED, scales="codes", block_activations=True)
COMPETITORS = ("olive4", "olive8", "tender4", "tender8", "int4", "nf4")

#: How to make each draft.
DRAFTS: dict[str, Callable[[Materials], Draft]] = {
    "exponent bits": partial(scheme_draft, "exponent-bits", False, False),
    "window, tensor scale": partial(scheme_draft, "window-tensor-scale", False, False),
    "window, group scale": partial(scheme_draft, "window-group-scale", False, False),
    "split 0": partial(shared_draft, Recipe(FormatConfig(split=0))),
    "no scale": partial(shared_draft, Recipe(scales="none")),
    "split 2": partial(shared_draft, Recipe()),
    "group 32": partial(shared_draft, Recipe(FormatConfig(group=32))),
    "calibrated": partial(shared_draft, _CALIBRATED),
    "codes": partial(shared_draft, _CODES),
    "by the weights": partial(built_draft, False, 0, 1.0),
    "fitted": partial(built_draft, True, 0, 1.0),
    "re-ranked": partial(built_draft, True, 8, 1.0),
    "half": partial(built_draft, True, 8, 0.5),
    "encoded": encoded_draft,
    "INT4": partial(scheme_draft, "int4", False, True),
    "NF4": partial(scheme_draft, "nf4", False, True),
} | {name: partial(scheme_draft, name, True, True) for name in COMPETITORS}


#: How to choose settings on calibration texts.
POLICIES: dict[str, Callable[..., Settings]] = {
    "margin": best_settings,
    "product rule": partial(best_policy, guesses=False),
    "guesses": partial(best_policy, free_steps=False),
    "free steps": best_policy,
}


@dataclass(frozen=True)
class Row:
    """One line of the ablation.

    Attributes
    ----------
    name : str
    draft : key of DRAFTS
    prototype : match rate and speedup of the design study; None where it has no such figure
    counted : costs of everything that is read, instead of a quarter for a draft pass
    rows, choices : of the speculation's settings
    policy : key of `POLICIES`
    """

    name: str
    draft: str
    prototype: tuple[float | None, float | None] = (None, None)
    counted: bool = False
    rows: int = 8
    choices: int = 1
    policy: str = "margin"


FORMAT_ROWS = (
    Row("drop exponent's low bit, no remap, scale per 64", "exponent bits", (0.147, 0.89)),
    Row("window of 8 exponents and scale per tensor", "window, tensor scale", (0.349, 1.07)),
    Row("window per tensor, scale per 64", "window, group scale", (0.484, 1.22)),
    Row("split 0, base exponent per 64, scale per 64", "split 0", (0.574, 1.33)),
    Row("split 2, base per 64, no scale", "no scale", (0.696, 1.50)),
    Row("split 2, base per 64, scale per 64", "split 2", (0.718, 1.55)),
    Row("split 2, base and scale per 32", "group 32", (0.754, 1.62)),
    Row("split 2, per 64, scale weighted by calibration", "calibrated", (0.759, 1.63)),
    Row("+ scale codes, 8-bit block activations", "codes"),
    Row("not bit-shared: INT4 per 64", "INT4", (0.731, 1.60)),
    Row("not bit-shared: NF4 per 64", "NF4", (0.791, 1.72)),
)

#: The steps to what `speq encode` writes and the accelerator runs, each on top of the one before.
STEP_ROWS = tuple(
    Row(name, draft, counted=True, choices=4)
    for name, draft in (
        ("all layers at 4 bits, scale codes by the weights", "by the weights"),
        ("+ scale codes by calibration inputs", "fitted"),
        ("+ best 8 tokens re-ranked", "re-ranked"),
        ("+ half of the vocabulary drafted", "half"),
    )
)

#: What `speq encode` has written, or the format that was asked for, and then the parts of the
#: policy, each on top of the one before.
ENCODED_ROWS = tuple(
    Row(f"as encoded: {label}", "encoded", counted=True, choices=choices, policy=policy)
    for label, choices, policy in (
        ("chain only", 1, "margin"),
        ("4 choices by margin", 4, "margin"),
        ("rows and lengths by probability", 4, "product rule"),
        ("+ guesses from the text", 4, "guesses"),
        ("+ steps without a draft pass", 4, "free steps"),
    )
)

EXTERNAL_ROWS = tuple(Row(f"external draft: {name}", name, counted=True) for name in COMPETITORS)

ROWS = FORMAT_ROWS + STEP_ROWS + ENCODED_ROWS + EXTERNAL_ROWS


@dataclass(frozen=True)
class RowResult:
    """Figures of a row.

    Attributes
    ----------
    row : Row
    match_rate : share of tokens that equal the draft's first choice
    speedup : with the row's costs
    counted_speedup : with everything counted
    settings : the settings of `speedup`, chosen on calibration texts
    storage_added : bytes beside the FP16 weights, as a share of theirs
    """

    row: Row
    match_rate: float
    speedup: Estimate
    counted_speedup: Estimate
    settings: Settings
    storage_added: float


@dataclass(frozen=True)
class LossyResult:
    """A competitor's scheme as a decoder of its own.

    Attributes
    ----------
    name : str
    differing : share of the FP16 text's tokens in whose place its own greedy text has another
    differing_next : share of tokens that it would have chosen otherwise behind the FP16 text
    perplexity, perplexity_fp16 : of the FP16 model's texts
    speedup : bytes of a plain FP16 pass over its own
    """

    name: str
    differing: float
    differing_next: float
    perplexity: float
    perplexity_fp16: float
    speedup: float


@dataclass(frozen=True)
class Ablation:
    """All results, rows in the order in which they were given."""

    rows: list[RowResult]
    lossy: list[LossyResult]


def draft_names(rows: Sequence[Row] = ROWS, lossy: Sequence[str] = COMPETITORS) -> list[str]:
    """The drafts that rows and decoders need, each once, in the order of their use."""
    return list(dict.fromkeys([*(row.draft for row in rows), *lossy]))


def run_ablation(
    materials: Materials,
    seed: int,
    rows: Sequence[Row] = ROWS,
    lossy: Sequence[str] = COMPETITORS,
    progress: Callable[[str], None] = lambda name: None,
) -> Ablation:
    """Every row, and the schemes named in `lossy` as decoders of their own.

    `progress` is called with each draft's name before the work on it starts.
    """
    results: dict[Row, RowResult] = {}
    decoders: list[LossyResult] = []
    fp16, _ = _teacher_forced(materials, materials.target)
    for name in draft_names(rows, lossy):
        progress(name)
        draft = DRAFTS[name](materials)
        same = [row for row in rows if row.draft == name]
        results |= dict(zip(same, _row_results(materials, draft, same, seed), strict=True))
        if name in lossy:
            decoders.append(_as_decoder(materials, name, draft, fp16))
    return Ablation([results[row] for row in rows], decoders)


def _row_results(
    materials: Materials, draft: Draft, rows: Sequence[Row], seed: int
) -> list[RowResult]:
    """Results of all rows that use one draft."""
    if not rows:
        return []
    length = max(row.rows for row in rows) - 1
    calibration = _samples(materials, draft, materials.calibration, length)
    evaluation = _samples(materials, draft, materials.evaluation, length)
    plain = draft.costs.plain
    quarter = Costs(draft.costs.config, plain, plain / 4, plain)
    added = draft.quantized.bytes_added if draft.quantized else draft.costs.verify - plain

    def best(row: Row, costs: Costs) -> tuple[Settings, Estimate, float]:
        choose = POLICIES[row.policy]
        settings = choose(calibration, costs, row.rows, row.choices, reranked=draft.reranked)
        figures = by_kind(evaluation, settings, costs, seed)["all"]
        return settings, figures.speedup, figures.match_rate

    results = []
    for row in rows:
        counted = best(row, draft.costs)
        settings, speedup, match = counted if row.counted else best(row, quarter)
        results.append(RowResult(row, match, speedup, counted[1], settings, added / plain))
    return results


def _samples(
    materials: Materials, draft: Draft, texts: Sequence[tuple[str, Text]], length: int
) -> list[Sample]:
    """The draft's chains along texts, with its own keys and values if it is external."""
    seen = [
        recache(materials.model, text, draft.linear) if draft.external else text
        for _, text in texts
    ]
    chains = draft_chains(materials.model, seen, draft.linear, length)
    return [Sample(kind, text, c) for (kind, text), c in zip(texts, chains, strict=True)]


def _teacher_forced(materials: Materials, linear: Linear) -> tuple[float, float]:
    """Perplexity of the evaluation texts' continuations, and the share of their tokens that are not
    the likeliest, both behind the true text before them."""
    total = differing = count = 0
    for _, text in materials.evaluation:
        scores = logits(materials.model, [*text.prompt, *text.tokens[:-1]], linear)
        scores = scores[len(text.prompt) - 1 :].to(torch.float64)
        chosen = torch.tensor(text.tokens)
        total -= float(scores.log_softmax(dim=1).gather(1, chosen[:, None]).sum())
        differing += int((scores.argmax(dim=1) != chosen).sum())
        count += len(chosen)
    return math.exp(total / count), differing / count


def _as_decoder(materials: Materials, name: str, draft: Draft, fp16: float) -> LossyResult:
    """A draft's model on its own; `fp16` is the target's perplexity."""
    texts = [text for _, text in materials.evaluation]
    perplexity, differing_next = _teacher_forced(materials, draft.linear)
    prompts = [text.prompt for text in texts]
    own = decode(materials.model, prompts, materials.max_tokens, draft.linear, materials.stop_ids)
    same = sum(
        a == b
        for text, other in zip(texts, own, strict=True)
        for a, b in zip(text.tokens, other.tokens, strict=False)
    )
    return LossyResult(
        name=name,
        differing=1 - same / sum(len(text.tokens) for text in texts),
        differing_next=differing_next,
        perplexity=perplexity,
        perplexity_fp16=fp16,
        speedup=draft.costs.plain / draft.costs.draft,
    )
