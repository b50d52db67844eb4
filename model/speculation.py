# SPDX-License-Identifier: Apache-2.0
"""Lossless speculative decoding with the draft model inside the FP16 weights.

A step drafts a chain of tokens with cheap passes, verifies all of them in one pass and commits
what the full model agrees with, plus one token of its own:

    draft    From the last committed token, up to L draft passes. The logits of a pass's best
             tokens may be computed once more, exactly (`Settings.reranked`). Stop early when the
             logit margin (best minus second best) falls below a threshold, or the chain has become
             unlikely. Verify rows that the chain does not fill go to the likeliest other paths:
             further choices at chain positions (alternates), and what followed where the last
             tokens have occurred before (guesses). So rows form a tree. Where such a guess is long
             and likely there is no draft pass at all. See `speq.model.draft_tree`.
    verify   One verify pass over the last committed token and the tree; each row attends to those
             on its path from the root.
    accept   Walk down the tree as long as the target's token is among the rows that follow. The
             target's token that is not ends the step, and is committed, too.

Greedy decoding commits the tokens, and the logit bits, of one-token-at-a-time decoding (contract
C4), because a row's bits depend on nothing but the tokens that it attends to. So does sampled
decoding with the sampler "gumbel": it is greedy decoding of logits / T plus noise, which depends on
seed, position and token alone and is the same for draft and target (`speq.model.gumbel`). With the
sampler "rsd" it has the target's distribution, but the text depends on what is drafted: choices of
a position are drawn without replacement from the draft's distribution and accepted by recursive
rejection (Jeon et al., "Recursive Speculative
Decoding", 2024; with one choice this is the rejection sampling of Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", 2023); a guess is a draw from a distribution
that has nothing else. Plain decoding is a draft length of 0.

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
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from speq.model.checkpoint import Model, ModelConfig
from speq.model.draft_tree import Origin, Proposal, chain_ends, free_proposal, grow
from speq.model.gumbel import gumbel
from speq.model.settings import Sampling, Settings
from speq.model.transformer import (
    DraftLinear,
    KVCache,
    NonFiniteError,
    Scores,
    forward,
    prefill,
)
from speq.model.vector_ops import ranked

#: Seeds have 64 bits.
MAX_SEED = 2**64 - 1


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
    alternates : alternates that were verified
    alternate_hit : whether one of them was accepted
    margins : the draft's logit margins along the chain
    repeated : whether a verify pass at this place was not finite, and this is its plain repetition
    guesses : guessed tokens that were verified
    guess_hits : guessed tokens that were accepted
    proposal : what was verified; empty in a plain step
    verified : float32 [rows, V], the logits of all rows of the verify pass
    """

    tokens: list[int]
    logits: torch.Tensor = field(repr=False)
    drafted: int
    accepted: int
    alternates: int
    alternate_hit: bool
    margins: list[float]
    repeated: bool = False
    guesses: int = 0
    guess_hits: int = 0
    proposal: Proposal = field(default_factory=Proposal, repr=False)
    verified: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)

    @property
    def rows(self) -> int:
        """Rows of the verify pass."""
        return 1 + self.drafted + self.alternates + self.guesses

    @property
    def origins(self) -> list[str]:
        """Where each token is from: "draft", "alternate", "guess" or, chosen by the target alone,
        "target"."""
        origins = ["draft"] * self.accepted + ["alternate"] * self.alternate_hit
        origins += ["guess"] * self.guess_hits
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
    guesses: int = 0
    guess_hits: int = 0
    free_steps: int = 0  # without a draft pass, because of a guess

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
        self.guesses += step.guesses
        self.guess_hits += step.guess_hits
        self.free_steps += step.guesses > 0 and step.drafted == 0

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
    """Probabilities, float64 [N, V], of logits [N, V] after temperature, top-k, top-p and min-p.

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
    if sampling.min_p > 0:
        p = torch.where(likely(logits.to(torch.float32), sampling).gather(-1, order), p, 0.0)
        p = p / p.sum(dim=-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, order, p)


def likely(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Which of logits float32 [N, V] min-p leaves, bool [N, V]: those whose probability is at least
    `min_p` times the largest one, which is to say, that are not below the largest logit plus
    T ln(min_p). This is one FP32 addition of the FP32 number nearest to T ln(min_p)."""
    return above_cutoff(logits, sampling.cutoff)


def above_cutoff(logits: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Which of logits float32 [N, V] are at least the row's largest plus an FP32 number; no NaN."""
    logits = torch.where(logits.isnan(), -math.inf, logits)
    return logits >= logits.amax(dim=-1, keepdim=True) + cutoff


def perturbed(
    logits: torch.Tensor, positions: Sequence[int], sampling: Sampling, seed: int
) -> torch.Tensor:
    """What the sampler "gumbel" decodes greedily: logits / T plus noise, float32 [N, V].

    Parameters
    ----------
    logits : float32 [N, V]
        Truncation leaves -infinity for all other tokens. A NaN counts as minus infinity.
    positions : of the token that each row chooses

    The scale of `with_noise` is the FP32 number nearest to 1 / T.
    """
    scores = with_noise(logits, positions, np.float32(1.0 / sampling.temperature), seed)
    if sampling.min_p:
        scores[~likely(logits, sampling)] = -math.inf
    if sampling.top_k or sampling.top_p < 1:
        # One row at a time, so that no bit depends on which others are in the pass.
        for row, score in zip(logits.split(1), scores, strict=True):
            score[distribution(row, sampling)[0] == 0] = -math.inf
    return scores


def with_noise(
    logits: torch.Tensor, positions: Sequence[int], scale: np.float32, seed: int
) -> torch.Tensor:
    """Logits [N, V] times `scale`, plus the noise of the tokens at each row's position, float32:
    one multiplication and one addition."""
    noise = np.stack([gumbel(seed, position, logits.shape[1]) for position in positions])
    return torch.from_numpy(logits.numpy() * scale + noise)


#: `perturbed` of logits and positions.
Noise = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


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

    q is the distribution that sampled choices were drawn from; None: there is no other choice than
    these, which is at most one.
    """
    if sampling is None:
        token = argmax(logits)
        return token, choices.index(token) if token in choices else None
    p = distribution(logits[None], sampling)
    if choices:
        if q is None:
            q = torch.zeros(p.shape[1], dtype=p.dtype)
            q[choices] = 1.0
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
    history: Sequence[int],
    layers: Mapping[str, DraftLinear],
    settings: Settings,
    most: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
) -> Proposal:
    """Draft a chain behind the last committed token and fill the rows that it leaves.

    Parameters
    ----------
    history : prompt and committed tokens, or the last of them
    most : largest depth of the tree, at least 1
    noise : what is drafted by, in place of logits, if not by the logits themselves

    The chain ends before a draft pass that is not finite. The cache is as before when this returns.
    """
    history = history[-settings.history :]
    free = free_proposal(settings.policy, history, settings.rows, most)
    if free is not None:
        return free
    start, token = cache.length, history[-1]
    choices, distributions, gaps = [], [], []
    while len(choices) < min(settings.length, most):
        scores = None if noise is None else _scores(noise, start + 1 + len(choices))
        try:
            logits = forward(
                *(model, [token], cache), draft=layers, reranked=settings.reranked, scores=scores
            )
        except NonFiniteError:
            break
        logits = (scores(logits) if scores else logits)[0]
        tokens, q = propose(logits, settings.offered, sampling, generator)
        if noise is not None:
            # What truncation or re-ranking has left out cannot be chosen.
            tokens = [token for token in tokens if logits[token] > -math.inf] or tokens[:1]
        gaps.append(ranked_gaps(logits, max(2, settings.offered)))
        choices.append(tokens)
        if q is not None:
            distributions.append(q)
        token = tokens[0]
        if chain_ends(settings.policy, settings.threshold, [gap[1] for gap in gaps]):
            break
    cache.truncate(start)
    proposal = grow(settings.policy, history, choices, gaps, settings.rows, most)
    proposal.distributions = distributions
    return proposal


def _scores(noise: Noise, position: int) -> Scores:
    """What the token at a position is chosen by, of logits [1, V]."""
    return lambda logits: noise(logits, [position])


def ranked_gaps(logits: torch.Tensor, count: int) -> list[float]:
    """How far the `count` largest of logits [V] are below the largest, FP32; +infinity where that
    is NaN, because infinities and NaN have no distance to others, or where there are no more."""
    best = logits[ranked(logits, count)]
    gap = best[0] - best
    gaps = torch.where(gap.isnan(), math.inf, gap).tolist()
    return gaps + [math.inf] * (count - len(gaps))


def verify(model: Model, cache: KVCache, root: int, proposal: Proposal) -> torch.Tensor:
    """One verify pass over root and proposal: logits float32 [rows, V].

    Appends one cache entry per row.
    """
    start = cache.length
    positions = [start + depth for depth in proposal.depths]
    mask = pass_mask(start, [0, *proposal.parents])
    return forward(model, [root, *proposal.tokens], cache, positions=positions, mask=mask)


def pass_mask(start: int, parents: Sequence[int]) -> torch.Tensor:
    """Which cache entries each row of a pass may attend to, bool [T, start + T].

    The pass appends an entry per row behind `start` others. Row i follows row `parents[i]`, an
    earlier one; row 0 is the root. A row attends to the entries before the pass, to those on its
    path from the root and to its own.
    """
    mask = torch.zeros(len(parents), start + len(parents), dtype=torch.bool)
    mask[0, :start] = True
    for row, parent in enumerate(parents):
        mask[row] |= mask[parent]
        mask[row, start + row] = True
    return mask


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
    while True:
        children = proposal.children(rows[-1])
        choices = [proposal.tokens[row - 1] for row in children]
        # On the chain, the row is the position. Guesses have no distribution.
        drawn = sampling is not None and rows[-1] < len(proposal.distributions)
        q = proposal.distributions[rows[-1]] if drawn else None
        token, match = choose(logits[rows[-1]], choices, q, sampling, generator)
        tokens.append(token)
        if match is None:
            return tokens, rows
        rows.append(children[match])


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
        Source of all randomness, needed for sampling; with the sampler "gumbel" it is not advanced,
        only its seed counts.
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
    noise = None
    if sampling is not None and generator is not None and sampling.sampler == "gumbel":
        # From here on decoding is greedy.
        noise = partial(perturbed, sampling=sampling, seed=generator.initial_seed() & MAX_SEED)
        sampling = None
    remaining = token_limit(model, prompt, max_tokens)
    text = text or TextCache(model.config)
    cache = text.begin(prompt, len(prompt) + max(0, remaining) + settings.rows)
    if remaining > 0 and (new := prompt[cache.length : -1]):
        prefill(model, new, cache)
        text.tokens += new
    history, number = list(prompt), 1
    # What is left of a proposal whose verify pass was not finite: choices of chain positions, and
    # the distributions that they were drawn from.
    failed: list[tuple[list[int], torch.Tensor | None]] = []
    plainly = repeated = False
    while remaining > 0:
        start, root = cache.length, history[-1]
        most = remaining - 1  # the target adds a token to what is accepted
        proposal = Proposal()
        if layers is not None and min(settings.length, most) > 0 and not plainly:
            proposal = draft(
                model, cache, history, layers, settings, most, sampling, generator, noise
            )
        try:
            logits = verify(model, cache, root, proposal)
        except NonFiniteError as error:
            if proposal.rows == 1:
                error.step = number
                raise
            failed, plainly, repeated = _chain_positions(proposal), True, True
            continue
        scores = logits
        if noise is not None:
            scores = noise(logits, [start + 1 + depth for depth in proposal.depths])
        if failed:
            (choices, q), *failed = failed
            token, match = choose(scores[0], choices, q, sampling, generator)
            tokens, rows = [token], [0]
            failed = failed if match == 0 else []
        else:
            tokens, rows = accept(proposal, scores, sampling, generator)
        plainly = bool(failed)
        cache.keep(start, [start + row for row in rows])
        step = committed_step(
            tokens[:remaining], rows, logits, proposal, stop_ids=stop_ids, repeated=repeated
        )
        text.tokens += [root, *step.tokens[:-1]]
        history += step.tokens
        yield step
        number, repeated = number + 1, False
        remaining = 0 if history[-1] in stop_ids else remaining - len(step.tokens)


def _chain_positions(proposal: Proposal) -> list[tuple[list[int], torch.Tensor | None]]:
    """The choices of each chain position, the chain's first, and their distribution."""
    positions = []
    for position in range(len(proposal.chain)):
        rows = proposal.children(position)
        q = proposal.distributions[position] if proposal.distributions else None
        positions.append(([proposal.tokens[row - 1] for row in rows], q))
    return positions


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
    proposal: Proposal,
    *,
    stop_ids: frozenset[int],
    repeated: bool,
) -> Step:
    """The step that commits `tokens`, but nothing behind a stop token.

    Parameters
    ----------
    tokens : those that were accepted and the target's, perhaps without the last ones
    rows : of the verify pass that each was chosen by, as of `accept`
    logits : float32 [rows of the pass, V]
    proposal : what was verified
    stop_ids : token ids after which decoding ends
    repeated : as of `Step`
    """
    ends = [i + 1 for i, token in enumerate(tokens) if token in stop_ids]
    count = min([len(tokens), *ends])
    origins = [proposal.origins[row - 1] for row in rows[1:]][:count]
    return Step(
        tokens=tokens[:count],
        logits=logits[rows[:count]],
        drafted=len(proposal.chain),
        accepted=origins.count(Origin.CHAIN),
        alternates=proposal.count(Origin.ALTERNATE),
        alternate_hit=Origin.ALTERNATE in origins,
        margins=proposal.margins,
        repeated=repeated,
        guesses=proposal.count(Origin.GUESS),
        guess_hits=origins.count(Origin.GUESS),
        proposal=proposal,
        verified=logits,
    )
