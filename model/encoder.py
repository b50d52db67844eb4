# SPDX-License-Identifier: Apache-2.0
"""The encoder's optimiser: how well the draft inside a model's weights drafts is decided here.

Every choice below leaves the weights' bits alone (contract C1), and the verify pass with them:

    scale codes   minimise the error of a layer's outputs on calibration inputs, tr(E M E^T) with E
                  the error of the drafted weights and M the second moment of the inputs, E[x x^T].
                  M's diagonal alone would ignore that errors of correlated inputs add up, or
                  cancel: coordinate descent over the groups of a row takes the whole of M.
    vocabulary    the head drafts only the lowest token ids if that pays. Byte-pair encodings number
                  tokens by the order of their merges, so that high ids are rare ones.
    re-ranking    how many of the draft head's best tokens have their logits computed exactly.
    policy        tables of probabilities, and how unlikely a chain may become (`policy_fit`).

Scale codes are fitted layer by layer. The rest is chosen by the modelled speedup on the calibration
texts. Vocabulary and re-ranking depend on each other, but one draft pass behind every token of the
texts is enough to compare all pairs of them: it keeps the draft head's best tokens, their drafted
logits and the exact ones (`Candidates`), from which each pair makes its own choices
(`expected_chains`). Settings are then chosen on the drafts themselves.

Everything is deterministic; emulated in float32 (`speq.model.emulation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import torch

from speq.model.checkpoint import Model, linear_names
from speq.model.emulation import (
    Chains,
    Linear,
    Text,
    decode,
    draft_chains,
    draft_linear,
    float_linear,
    float_weights,
    prefill,
    reranked_linear,
)
from speq.model.evaluation import Sample, encoded_costs, speedup
from speq.model.format import EncodedTensor, encode
from speq.model.number_format import (
    SCALE_DENOMINATOR,
    SCALE_NUMERATORS,
    UNIT_SCALE_CODE,
    FormatConfig,
)
from speq.model.policy_fit import best_policy
from speq.model.settings import MAX_RERANKED
from speq.model.speculation import Settings

#: Parts of the vocabulary that the head may draft.
HEAD_PARTS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
#: Numbers of tokens that may be re-ranked.
RERANKED = (0, 2, 3, 4, 6, MAX_RERANKED)

_DIAGONAL_SHARE = 0.1  # of the moment's off-diagonal that is distrusted: it is a finite sample's
_SWEEPS = 2
_CANDIDATES = 32  # of the whole vocabulary: enough that a part of it has some of them
# Inputs that several layers share.
_SOURCE = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


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
class Trial:
    """A part of the vocabulary that the head drafts and a number of tokens that are re-ranked.

    Attributes
    ----------
    drafted_outputs, reranked : int
    cost : of a draft pass, relative to a plain pass
    speedup : expected on the calibration texts
    """

    drafted_outputs: int
    reranked: int
    cost: float
    speedup: float


@dataclass(frozen=True)
class OptimisedEncoding:
    """An optimised encoding.

    Attributes
    ----------
    tensors : encoded linear layers by name
    chain, alternates : settings that were best on the calibration texts without alternates and with
    speedups : modelled speedup on the calibration texts with each of the two
    tried : all trials; the best one was taken
    """

    tensors: dict[str, EncodedTensor] = field(repr=False)
    chain: Settings
    alternates: Settings
    speedups: tuple[float, float]
    tried: list[Trial]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The draft head's best tokens behind every token of a text, by falling drafted logit.

    Attributes
    ----------
    tokens : torch.int64 [P, N]
    drafted, exact : torch.float32 [P, N]
        Their logits by the draft head, and by the FP16 head of the same input.
    """

    tokens: torch.Tensor
    drafted: torch.Tensor
    exact: torch.Tensor


def calibrate(model: Model, prompts: Sequence[Sequence[int]], max_tokens: int) -> Calibration:
    """Decode calibration prompts and collect the inputs of all linear layers.

    Raises
    ------
    ValueError
        If there are no prompts, or one is empty or too long for the model.
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    target = float_linear(float_weights(model))
    texts = decode(model, prompts, max_tokens, target, model.tokenizer.stop_ids)
    return collect_inputs(model, texts, target)


def collect_inputs(model: Model, texts: Sequence[Text], target: Linear) -> Calibration:
    """The inputs of all linear layers of the FP16 model, `target`, along its texts."""
    inputs: dict[str, list[torch.Tensor]] = {}
    for text in texts:
        skip = len(text.prompt) - 1

        def collect(name: str, x: torch.Tensor, skip: int = skip) -> torch.Tensor:
            if _shared_input(name) == name:
                inputs.setdefault(name, []).append(x[skip:])
            return target(name, x)

        prefill(model, [*text.prompt, *text.tokens[:-1]], collect)
    return Calibration(list(texts), {name: torch.cat(rows) for name, rows in inputs.items()})


def _shared_input(name: str) -> str:
    """The first of the layers that have the same input."""
    prefix, dot, last = name.rpartition(".")
    return prefix + dot + _SOURCE.get(last, last)


def unit_levels(weights: torch.Tensor, config: FormatConfig) -> torch.Tensor:
    """Draft values float32 [O, K] of weights at scale 1; 0 in groups with inf or NaN."""
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


def encode_fitted(
    weights: torch.Tensor, moment: torch.Tensor, config: FormatConfig, name: str, columns: int
) -> EncodedTensor:
    """Encode weights float16 [O, K], their scale codes fitted to the inputs' second moment [K, K].

    `name` and `columns` are those of `encode`.
    """
    exact = weights.to(torch.float32).nan_to_num(0.0, 0.0, 0.0)
    codes = fit_scales(exact, unit_levels(weights, config), moment, config.group, _SWEEPS)
    return encode(weights, config, codes.numpy(), name, columns)


def find_candidates(
    model: Model,
    texts: Sequence[Text],
    tensors: Mapping[str, EncodedTensor],
    count: int,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Candidates]:
    """The `count` best tokens of draft passes behind every token of the texts.

    `progress` is called with the number of passes finished since the last call.
    """
    head, drafts = model.linear_weight("head").to(torch.float32), draft_linear(tensors)
    exact: list[torch.Tensor] = []

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        y = drafts(name, x)
        if name == "head":
            best = torch.topk(y, count).indices
            exact.append(torch.einsum("tk,tnk->tn", x.to(torch.float32), head[best]))
        return y

    chains = draft_chains(model, texts, linear, 1, count, progress=progress)
    parts = torch.cat(exact).split([len(text.tokens) for text in texts])
    return [
        Candidates(chain.choices[:, 0], chain.scores[:, 0], part)
        for chain, part in zip(chains, parts, strict=True)
    ]


def expected_chains(
    found: Candidates, drafted_outputs: int, reranked: int, length: int, choices: int
) -> Chains:
    """Chains of `length` tokens of a head that drafts only the lowest `drafted_outputs` ids and
    computes the logits of its `reranked` best tokens exactly (0: of none).

    They are expected ones: every pass of a chain proposes what it would propose behind the text. So
    it does while the chain follows the text; behind that only its margins count, for what it costs.
    """
    allowed = found.tokens < drafted_outputs
    scores = torch.where(allowed, found.exact if reranked else found.drafted, -torch.inf)
    if reranked:
        scores = scores.masked_fill(allowed.cumsum(dim=1) > reranked, -torch.inf)
    scores, index = scores.sort(dim=1, descending=True, stable=True)
    tokens = torch.where(scores > -torch.inf, found.tokens.gather(1, index), -1)
    scores[:, 0].clamp_(min=torch.finfo().min)  # if there is none: margins are differences to it
    last = len(tokens) - 1
    place = (torch.arange(last + 1)[:, None] + torch.arange(length)).clamp(max=last)
    return Chains(tokens[place, :choices], scores[place, :choices])


def _best_head(
    model: Model,
    texts: Sequence[Text],
    tensors: Mapping[str, EncodedTensor],
    found: Sequence[Candidates],
    rows: int,
    choices: int,
) -> list[Trial]:
    """Trials of all parts of the vocabulary and numbers of re-ranked tokens, the best first."""
    head = tensors["head"]
    outputs, columns = head.shape[0], head.columns
    # Whole tiles, and enough for all rows of a verify pass.
    least = -(-max(rows, MAX_RERANKED) // columns) * columns
    parts = {
        min(outputs, max(least, round(outputs * part / columns) * columns)) for part in HEAD_PARTS
    }
    tried = []
    for drafted, reranked in product(sorted(parts, reverse=True), RERANKED):
        some = {**tensors, "head": replace(head, drafted_outputs=drafted)}
        costs = encoded_costs(model.config, some, reranked)
        samples = [
            Sample(
                "calibration",
                text,
                expected_chains(c, drafted, reranked, rows - 1, max(2, choices)),
            )
            for text, c in zip(texts, found, strict=True)
        ]
        settings = best_policy(samples, costs, rows, choices, reranked, guesses=False)
        tried.append(Trial(drafted, reranked, costs.relative[0], speedup(samples, settings, costs)))
    return sorted(tried, key=lambda trial: -trial.speedup)


def optimise(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    config: FormatConfig | None = None,
    columns: int = 16,
    rows: int = 8,
    choices: int = 4,
    max_tokens: int = 64,
    progress: Progress = lambda what, done, total: None,
) -> OptimisedEncoding:
    """Find the encoding of all linear layers whose drafts make decoding fastest.

    Parameters
    ----------
    prompts : token ids of calibration prompts
    config, columns : of the format, for all tensors
    rows, choices : of the verify pass (`Settings`) that speeds are modelled for
    max_tokens : length of the calibration texts
    progress : called with what is being done, how much of it is done, and of how much

    Raises
    ------
    ValueError
        If an argument is impossible.
    """
    config = config or FormatConfig()
    progress("decoding calibration texts", 0, 1)
    calibration = calibrate(model, prompts, max_tokens)
    texts = calibration.texts

    names, tensors = linear_names(model.config), {}
    for i, name in enumerate(names):
        progress("fitting scales", i, len(names))
        weights, moment = model.linear_weight(name), calibration.moment(name)
        tensors[name] = encode_fitted(weights, moment, config, name, columns)

    passes = sum(len(text.tokens) for text in texts)
    done = {"trying heads": 0, "drafting": 0}

    def advance(what: str) -> Callable[[int], None]:
        progress(what, 0, passes)

        def count(finished: int) -> None:
            done[what] += finished
            progress(what, done[what], passes)

        return count

    kept = min(tensors["head"].shape[0], _CANDIDATES)
    found = find_candidates(model, texts, tensors, kept, progress=advance("trying heads"))
    tried = _best_head(model, texts, tensors, found, rows, choices)
    best = tried[0]
    if best.drafted_outputs < tensors["head"].shape[0]:
        tensors["head"] = replace(tensors["head"], drafted_outputs=best.drafted_outputs)

    linear = draft_linear(tensors)
    if best.reranked:
        head = model.linear_weight("head").to(torch.float32)
        linear = reranked_linear(linear, head, best.reranked)
    chains = draft_chains(
        model, texts, linear, rows - 1, max(2, choices), progress=advance("drafting")
    )
    costs = encoded_costs(model.config, tensors, best.reranked)
    samples = [Sample("calibration", *pair) for pair in zip(texts, chains, strict=True)]
    chain, alternates = (best_policy(samples, costs, rows, n, best.reranked) for n in (1, choices))
    speeds = speedup(samples, chain, costs), speedup(samples, alternates, costs)
    return OptimisedEncoding(tensors, chain, alternates, speeds, tried)
