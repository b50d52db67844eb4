# SPDX-License-Identifier: Apache-2.0
"""Lossless speculative decoding with the draft model inside the FP16 weights.

A step drafts a chain of tokens with cheap passes, verifies all of them in one pass and commits
what the full model agrees with, plus one token of its own:

    draft    From the last committed token, up to L draft passes. The logits of a pass's best
             tokens may be computed once more, exactly (`Settings.reranked`). Stop early when the
             logit margin (best minus second best) falls below a threshold. Verify rows that the
             chain does not fill carry leaf alternates: further choices at chain positions, each of
             which attends to the chain before it and to itself.
    verify   One verify pass over the last committed token, the chain and the alternates.
    accept   Walk down the chain as long as the target's token is among the choices of a
             position. An alternate ends the walk, and yields the token after it as well.

Greedy decoding commits the tokens, and the logit bits, of one-token-at-a-time decoding (contract
C4), because a row's bits depend on nothing but the tokens that it attends to. Sampled decoding has
exactly the target's distribution: choices of a position are drawn without replacement from the
draft's distribution and accepted by recursive rejection (Jeon et al., "Recursive Speculative
Decoding", 2024; with one choice this is the rejection sampling of Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", 2023). Plain decoding is a draft length of 0.

The cache holds every committed token but the last. Draft passes append their own entries behind
them, which are dropped before the verify pass writes its own in the same slots; of those, the
accepted rows' stay. Ties go to the lowest token id everywhere.

Decoding ends with a `NonFiniteError` where plain decoding does, and not before: a draft pass with a
result that is not finite ends the chain before it; behind such a verify pass, decoding is plain for
as long as it follows that pass's chain. What was proposed there still counts, so that sampled
decoding keeps its distribution.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from speq.model.checkpoint import Model, ModelConfig
from speq.model.settings import Sampling, Settings
from speq.model.transformer import DraftLinear, KVCache, NonFiniteError, forward, prefill
from speq.model.vector_ops import ranked


@dataclass(frozen=True)
class Proposal:
    """What a verify pass is to check.

    Attributes
    ----------
    choices : for each chain position the chain's token, then its alternates
    margins : for each chain position the draft's best logit minus its second best; +infinity where
        that is NaN
    distributions : for each chain position the draft's distribution that the choices were drawn
        from, float64 [V]; empty in greedy decoding
    """

    choices: list[list[int]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    distributions: list[torch.Tensor] = field(default_factory=list)

    @property
    def chain(self) -> list[int]:
        """The chain's tokens; number i is in row i + 1 of the verify pass."""
        return [tokens[0] for tokens in self.choices]

    @property
    def alternates(self) -> list[tuple[int, int]]:
        """(chain position, token) of each alternate, in the order of their rows."""
        return [(i, token) for i, tokens in enumerate(self.choices) for token in tokens[1:]]

    def rows_of(self, position: int) -> list[int]:
        """Rows of the verify pass in which the choices of a chain position are."""
        first = 1 + len(self.choices) + sum(len(c) - 1 for c in self.choices[:position])
        return [1 + position, *range(first, first + len(self.choices[position]) - 1)]

    def behind(self, match: int | None) -> Proposal:
        """What is left of it behind its first position, of which choice `match` was committed
        (None: none of them)."""
        if match != 0:
            return Proposal()
        return Proposal(self.choices[1:], self.margins[1:], self.distributions[1:])


@dataclass(frozen=True)
class Step:
    """One committed step.

    Attributes
    ----------
    tokens : the committed tokens: accepted chain tokens, perhaps an accepted alternate, and last
        the target's own token (unless decoding ended before it)
    logits : float32 [len(tokens), V], the verify logits that each was chosen by
    drafted : length of the chain, which is the number of draft passes
    accepted : chain tokens that were accepted
    alternates : leaf alternates that were verified
    alternate_hit : whether one of them was accepted
    margins : the draft's logit margins along the chain
    repeated : whether a verify pass at this place was not finite, and this is its plain repetition
    """

    tokens: list[int]
    logits: torch.Tensor = field(repr=False)
    drafted: int
    accepted: int
    alternates: int
    alternate_hit: bool
    margins: list[float]
    repeated: bool = False

    @property
    def origins(self) -> list[str]:
        """Where each token is from: "draft", "alternate" or, chosen by the target alone,
        "target"."""
        origins = ["draft"] * self.accepted + ["alternate"] * self.alternate_hit
        return origins + ["target"] * (len(self.tokens) - len(origins))


@dataclass
class Statistics:
    """Counts over steps, and the figures that follow from them."""

    verify_passes: int = 0
    draft_passes: int = 0
    committed: int = 0
    accepted: int = 0
    compared: int = 0
    alternates: int = 0
    alternate_hits: int = 0
    repeated: int = 0

    def add(self, step: Step) -> None:
        """Count a step."""
        self.verify_passes += 1
        self.draft_passes += step.drafted
        self.committed += len(step.tokens)
        self.accepted += step.accepted
        # Chain tokens behind the first that was refused are not compared with the target.
        self.compared += min(step.drafted, step.accepted + 1, len(step.tokens))
        self.alternates += step.alternates
        self.alternate_hits += step.alternate_hit
        self.repeated += step.repeated

    @property
    def match_rate(self) -> float:
        """Share of the compared chain tokens that were accepted; NaN if none was compared."""
        return self.accepted / self.compared if self.compared else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """Tokens committed per verify pass; NaN before the first."""
        return self.committed / self.verify_passes if self.verify_passes else math.nan

    def speedup(self, draft_cost: float = 0.25, verify_cost: float = 1.0) -> float:
        """Modelled speedup over plain FP16 decoding, from the costs of a draft and of a verify
        pass in units of a plain pass; NaN before the first step."""
        cost = self.draft_passes * draft_cost + self.verify_passes * verify_cost
        return self.committed / cost if cost else math.nan


def argmax(logits: torch.Tensor) -> int:
    """Index of the largest of logits [V], the lowest index if there are several."""
    return int(ranked(logits, 1)[0])


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities, float64 [N, V], of logits [N, V] after temperature, top-k and top-p.

    A NaN counts as minus infinity. Raises ValueError if a row has no finite maximum.
    """
    logits = torch.where(logits.isnan(), -math.inf, logits).to(torch.float64)
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise ValueError("cannot sample: the largest logit is not finite")
    # A stable sort: among equal logits, the lowest token ids are kept.
    values, order = torch.sort(logits / sampling.temperature, stable=True, descending=True)
    if sampling.top_k:
        values[:, sampling.top_k :] = -math.inf
    p = values.softmax(dim=-1)
    if sampling.top_p < 1:
        before = p.cumsum(dim=-1) - p
        p = torch.where(before < sampling.top_p, p, 0.0)
        p = p / p.sum(dim=-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, order, p)


def sample(p: torch.Tensor, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draws `count` different indices, int64 [N, count], one after the other from each row of the
    probabilities float64 [N, V], of which at least `count` must not be 0.

    An exponential race: the order of arrivals at rates p is that of draws without replacement.
    """
    uniform = torch.rand(p.shape, generator=generator, dtype=torch.float64)
    arrival = torch.where(p > 0, -torch.log1p(-uniform) / p, math.inf)
    return torch.topk(arrival, count, largest=False).indices


def recursive_rejection(
    p: torch.Tensor, q: torch.Tensor, choices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How to accept choices so that the outcome has the distribution p.

    Parameters
    ----------
    p, q : torch.float64 [N, V]
        Target's and draft's probabilities.
    choices : torch.int64 [N, C]
        Drawn from q without replacement, in the order of their drawing.

    Returns
    -------
    accept : torch.float64 [N, C]
        Probability of accepting each choice if those before it were refused.
    residual : torch.float64 [N, V]
        The distribution to draw from if all were refused.
    """
    accept = torch.empty(choices.shape, dtype=torch.float64)
    for i in range(choices.shape[1]):
        x = choices[:, i : i + 1]
        accept[:, i : i + 1] = (p.gather(1, x) / q.gather(1, x)).clamp(max=1.0)
        # What a refusal leaves of the target, and what the next choice was drawn from.
        p = _normalized((p - q).clamp(min=0.0), otherwise=p)
        q = q.scatter(1, x, 0.0)
        q = _normalized(q, otherwise=q)
    return accept, p


def _normalized(weights: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Rows of weights divided by their sums; where a sum is 0, which is never needed, the other."""
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total, otherwise)


def propose(
    logits: torch.Tensor,
    count: int,
    sampling: Sampling | None,
    generator: torch.Generator | None,
) -> tuple[list[int], torch.Tensor | None]:
    """Up to `count` choices of a position from the draft's logits [V], the chain's first.

    Greedy: the largest. Sampled: drawn without replacement; their distribution is returned too.
    """
    if sampling is None:
        return ranked(logits, count).tolist(), None
    q = distribution(logits[None], sampling)
    count = min(count, int((q > 0).sum()))
    return sample(q, count, generator)[0].tolist(), q[0]


def choose(
    logits: torch.Tensor,
    choices: Sequence[int],
    q: torch.Tensor | None,
    sampling: Sampling | None,
    generator: torch.Generator | None,
) -> tuple[int, int | None]:
    """The target's token from its logits [V], and which choice it is (None: none of them).

    q is the distribution that sampled choices were drawn from.
    """
    if sampling is None:
        token = argmax(logits)
        return token, choices.index(token) if token in choices else None
    p = distribution(logits[None], sampling)
    if choices and q is not None:
        accept, p = recursive_rejection(p, q[None], torch.tensor([choices]))
        uniform = torch.rand(len(choices), generator=generator, dtype=torch.float64)
        accepted = (uniform < accept[0]).nonzero()
        if len(accepted):
            i = int(accepted[0])
            return choices[i], i
    return int(sample(p, 1, generator)), None


def draft(
    model: Model,
    cache: KVCache,
    root: int,
    layers: Mapping[str, DraftLinear],
    settings: Settings,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> Proposal:
    """Draft a chain behind the last committed token `root` and select leaf alternates.

    The chain ends before a draft pass that is not finite. The cache is as before when this returns.
    """
    start, token = cache.length, root
    choices, distributions, gaps = [], [], []
    while len(choices) < settings.length:
        try:
            passed = forward(model, [token], cache, draft=layers, reranked=settings.reranked)
            logits = passed[0]
        except NonFiniteError:
            break
        tokens, q = propose(logits, settings.offered, sampling, generator)
        best = logits[ranked(logits, max(2, settings.offered))]
        gap = best[0] - best
        # Infinities and NaN have no distance to others.
        gaps.append(torch.where(gap.isnan(), math.inf, gap).tolist())
        choices.append(tokens)
        if q is not None:
            distributions.append(q)
        token = tokens[0]
        if gaps[-1][1] < settings.threshold:
            break
    cache.truncate(start)
    counts = allot_alternates(gaps, [len(c) for c in choices], settings.rows)
    kept = [tokens[: 1 + n] for tokens, n in zip(choices, counts, strict=True)]
    return Proposal(kept, [gap[1] for gap in gaps], distributions)


def allot_alternates(
    gaps: Sequence[Sequence[float]], available: Sequence[int], rows: int
) -> list[int]:
    """How many alternates each chain position gets of the rows that root and chain leave.

    gaps[i][j] says how far the draft's choice j (0 is the best) at position i is below the best;
    available[i] is the number of choices there. Those with the smallest gaps win. For
    sampled decoding to be exact the count must not depend on which alternates were drawn, and the
    gaps of the ranked logits do not.
    """
    offers = sorted(
        (gap[j], i, j)
        for i, (gap, n) in enumerate(zip(gaps, available, strict=True))
        for j in range(1, n)
    )
    counts = [0] * len(gaps)
    for _, i, _ in offers[: rows - 1 - len(gaps)]:
        counts[i] += 1
    return counts


def verify(model: Model, cache: KVCache, root: int, proposal: Proposal) -> torch.Tensor:
    """One verify pass over root, chain and alternates: logits float32 [rows, V].

    Appends one cache entry per row.
    """
    start, chain, alternates = cache.length, proposal.chain, proposal.alternates
    tokens = [root, *chain, *(token for _, token in alternates)]
    depths = [*range(1 + len(chain)), *(1 + i for i, _ in alternates)]
    positions = [start + depth for depth in depths]
    return forward(model, tokens, cache, positions=positions, mask=pass_mask(start, depths))


def pass_mask(start: int, depths: Sequence[int]) -> torch.Tensor:
    """Which cache entries each row of a pass may attend to, bool [T, start + T].

    The pass appends an entry per row behind `start` others. Its first rows are a chain, of depths
    0, 1, ...; the others are leaves, `depths[i]` behind `start`. A row attends to the entries
    before the pass, to those of the chain before its depth and to its own.
    """
    rows = torch.arange(len(depths))
    entries = torch.arange(start + len(depths))
    positions = start + torch.tensor(depths)
    return (entries < positions[:, None]) | (entries == start + rows[:, None])


def accept(
    proposal: Proposal,
    logits: torch.Tensor,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Which tokens the target's logits [rows, V] commit, and by which rows each was chosen.

    Row 0, the root's, is always the first; the tokens but the last are those of the other rows.
    """
    rows, tokens = [0], []
    chain = len(proposal.choices)
    while True:
        position = len(tokens)
        on_chain = rows[-1] == position < chain
        choices = proposal.choices[position] if on_chain else []
        q = proposal.distributions[position] if on_chain and sampling else None
        token, match = choose(logits[rows[-1]], choices, q, sampling, generator)
        tokens.append(token)
        if match is None:
            return tokens, rows
        rows.append(proposal.rows_of(position)[match])


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of two texts are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


class TextCache:
    """A KV cache that outlives a run: the next one finds what it holds of its prompt's beginning.

    Which pass has written an entry makes no difference to its bits: a prompt's or a verify pass.

    Attributes
    ----------
    entries : KVCache
    tokens : list of int
        Whose entries its first slots hold. Whatever lies behind them counts for nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.entries = KVCache(config, 0)
        self.tokens: list[int] = []

    def known(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's tokens, of which the last is never one, need no entry."""
        return shared_prefix(self.tokens, prompt[:-1])

    def begin(self, prompt: Sequence[int], capacity: int) -> KVCache:
        """The cache with the entries that it has of the prompt, and room for so many slots."""
        known = self.known(prompt)
        del self.tokens[known:]
        self.entries.truncate(known)
        self.entries.reserve(capacity)
        return self.entries


def generate(
    model: Model,
    prompt: Sequence[int],
    layers: Mapping[str, DraftLinear] | None,
    *,
    max_tokens: int,
    settings: Settings | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_ids: frozenset[int] = frozenset(),
    text: TextCache | None = None,
) -> Generator[Step, None, None]:
    """Decode behind `prompt` and yield every committed step.

    Parameters
    ----------
    model : Model
    prompt : one or more token ids
    layers : from `prepare_draft_linears`
        The draft model; None decodes plainly, as does a draft length of 0.
    max_tokens : int
        Ends after this many tokens, and where the model's context ends.
    settings : Settings, optional
    sampling : Sampling, optional
        Greedy decoding when not given.
    generator : torch.Generator
        Source of all randomness; needed for sampling.
    stop_ids : token ids after which decoding ends
    text : TextCache, optional
        Where the keys and values are kept, also those of an earlier run; the steps do not depend on
        it. For one run at a time.

    Raises
    ------
    ValueError
        If the prompt is empty or too long for the model, or sampling lacks a generator.
    NonFiniteError
        If plain decoding cannot go on: the prompt, or the pass of the last committed token alone,
        has a result that is not finite.
    """
    settings = settings or Settings()
    if sampling is not None and generator is None:
        raise ValueError("sampled decoding needs a generator")
    remaining = token_limit(model, prompt, max_tokens)
    text = text or TextCache(model.config)
    cache = text.begin(prompt, len(prompt) + max(0, remaining) + settings.rows)
    if remaining > 0 and (new := prompt[cache.length : -1]):
        prefill(model, new, cache)
        text.tokens += new
    root, number = prompt[-1], 1
    failed, repeated = Proposal(), False  # what is left of one whose verify pass was not finite
    while remaining > 0:
        start = cache.length
        # The target adds a token to what is accepted.
        limit = min(settings.length, remaining - 1)
        proposal = Proposal()
        if layers is not None and limit and not failed.choices:
            limited = replace(settings, draft_length=limit)
            proposal = draft(model, cache, root, layers, limited, sampling, generator)
        try:
            logits = verify(model, cache, root, proposal)
        except NonFiniteError as error:
            if not proposal.choices:
                error.step = number
                raise
            failed, repeated = proposal, True
            continue
        if failed.choices:
            q = failed.distributions[0] if sampling else None
            token, match = choose(logits[0], failed.choices[0], q, sampling, generator)
            tokens, rows, failed = [token], [0], failed.behind(match)
        else:
            tokens, rows = accept(proposal, logits, sampling, generator)
        cache.keep(start, [start + row for row in rows])
        step = committed_step(
            tokens[:remaining],
            rows,
            logits,
            drafted=len(proposal.choices),
            alternates=len(proposal.alternates),
            margins=proposal.margins,
            stop_ids=stop_ids,
            repeated=repeated,
        )
        text.tokens += [root, *step.tokens[:-1]]
        yield step
        root, number, repeated = step.tokens[-1], number + 1, False
        remaining = 0 if root in stop_ids else remaining - len(step.tokens)


def token_limit(model: Model, prompt: Sequence[int], max_tokens: int) -> int:
    """How many tokens, at most `max_tokens`, the model's context leaves behind a prompt.

    Raises ValueError if the prompt is empty or leaves none.
    """
    limit = min(max_tokens, model.config.context - len(prompt))
    if not prompt or (limit < 1 <= max_tokens):
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; expected 1 to {model.config.context - 1}"
        )
    return limit


def committed_step(
    tokens: list[int],
    rows: list[int],
    logits: torch.Tensor,
    *,
    drafted: int,
    alternates: int,
    margins: list[float],
    stop_ids: frozenset[int],
    repeated: bool,
) -> Step:
    """The step that commits `tokens`, but nothing behind a stop token.

    Parameters
    ----------
    tokens : those that were accepted and the target's, perhaps without the last ones
    rows : of the verify pass that each was chosen by, as of `accept`
    logits : float32 [rows of the pass, V]
    drafted, alternates, margins, repeated : as of `Step`
    stop_ids : token ids after which decoding ends
    """
    ends = [i + 1 for i, token in enumerate(tokens) if token in stop_ids]
    count = min([len(tokens), *ends])
    accepted = sum(0 < row <= drafted for row in rows)
    return Step(
        tokens=tokens[:count],
        logits=logits[rows[:count]],
        drafted=drafted,
        accepted=min(accepted, count),
        alternates=alternates,
        alternate_hit=rows[-1] > drafted and count > accepted,
        margins=margins,
        repeated=repeated,
    )
