# SPDX-License-Identifier: Apache-2.0
"""Fits the tables of a `Policy` to calibration texts, and chooses its limits by modelled speedup.

What is counted is what greedy speculation would meet: chain tokens behind right ones, the choices
beside them, and the tokens behind matches, along texts that are the target's own. Probabilities
rise with margins and with the lengths of matches and fall with gaps; counts are too few to show
that everywhere, so that tables are made monotone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from speq.model.draft_tree import gap_index, longest_match
from speq.model.evaluation import Costs, Sample, speedup
from speq.model.settings import (
    COST_STEPS,
    DEFAULT_HISTORY,
    GAP_INDICES,
    LONGEST_MATCH,
    MAX_COST,
    NO_GUESS,
    Policy,
    Settings,
)

#: Costs of a chain, in sixteenths of a bit, among which the best limit is chosen: a chain ends
#: where its probability falls below 84 % to 4 %.
LIMITS = (4, 8, 12, 16, 20, 24, 32, 40, 56, 76)
#: What is assumed before anything is counted, with the weight of one observation.
_PRIOR, _GUESS_PRIOR = 0.5, 0.25

#: How often something happened, and was looked for.
_Counts = list[list[int]]


def fit_tables(samples: Sequence[Sample], history: int = DEFAULT_HISTORY) -> Policy:
    """The policy whose tables hold what has been counted on samples; it has no limits.

    Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("no texts to fit a policy to")
    chain, alternates = _no_counts(GAP_INDICES), _no_counts(GAP_INDICES)
    guesses = _no_counts(LONGEST_MATCH)
    for sample in samples:
        _count_drafts(sample, chain, alternates)
        _count_guesses(sample, guesses, history)
    return Policy(
        chain_costs=tuple(accumulate((_cost(c, _PRIOR) for c in chain), min)),
        alternate_costs=tuple(accumulate((_cost(c, _PRIOR) for c in alternates), max)),
        guess_costs=tuple(
            accumulate((min(_cost(c, _GUESS_PRIOR), NO_GUESS - 1) for c in guesses), min)
        ),
    )


def best_policy(
    samples: Sequence[Sample],
    costs: Costs,
    rows: int,
    choices: int,
    reranked: int = 0,
    history: int = DEFAULT_HISTORY,
    *,
    guesses: bool = True,
    free_steps: bool = True,
) -> Settings:
    """The settings with the highest modelled speedup on calibration samples.

    Chains end where they have become unlikely, not by a margin. Of equal settings the first wins.

    Parameters
    ----------
    samples : with chains of rows - 1 tokens, or shorter ones, which then limit the drafts
    costs : of the passes
    rows, choices, reranked, history : as of `Settings`
    guesses : whether free rows may have guesses
    free_steps : whether guesses may replace draft passes

    Raises ValueError if there are no samples.
    """
    policy = fit_tables(samples, history)
    if not guesses:
        policy = replace(policy, guess_costs=(NO_GUESS,) * LONGEST_MATCH)
    length = min(rows - 1, samples[0].chains.choices.shape[1])
    settings = Settings(rows, length, 0.0, choices, reranked, policy, history)

    def best(options: Sequence[Policy]) -> Policy:
        return max(
            options, key=lambda option: speedup(samples, replace(settings, policy=option), costs)
        )

    policy = best([replace(policy, limit=limit) for limit in LIMITS])
    if policy.guesses and free_steps:
        # Matches of some length and all that are likelier.
        bounds = sorted({0, *(cost + 1 for cost in policy.guess_costs)})
        policy = best([replace(policy, guess_limit=bound) for bound in bounds])
        policy = best([replace(policy, limit=limit) for limit in LIMITS])
    return replace(settings, policy=policy)


def _no_counts(count: int) -> _Counts:
    return [[0, 0] for _ in range(count)]


def _add(counts: list[int], happened: bool) -> None:
    counts[0] += happened
    counts[1] += 1


def _cost(counts: list[int], prior: float) -> int:
    probability = (counts[0] + prior) / (counts[1] + 1)
    return min(round(-COST_STEPS * math.log2(probability)), MAX_COST)


def _count_drafts(sample: Sample, chain: _Counts, alternates: _Counts) -> None:
    """Chain tokens behind right ones, and the other choices at these places."""
    choices = sample.chains.choices.tolist()
    scores = sample.chains.scores
    gaps = (scores[..., :1] - scores).nan_to_num(math.inf).tolist()
    tokens = sample.text.tokens
    for start, (positions, gaps_of) in enumerate(zip(choices, gaps, strict=True)):
        for token, drafted, gap in zip(tokens[start:], positions, gaps_of, strict=False):
            _add(chain[gap_index(gap[1])], drafted[0] == token)
            for other, distance in zip(drafted[1:], gap[1:], strict=True):
                if distance < math.inf:
                    _add(alternates[gap_index(distance)], other == token)
            if drafted[0] != token:
                break


def _count_guesses(sample: Sample, guesses: _Counts, history: int) -> None:
    """Tokens of continuations behind right ones, of the matches at every place of the text."""
    text = [*sample.text.prompt, *sample.text.tokens]
    for start in range(len(sample.text.prompt), len(text)):
        seen = text[max(0, start - history) : start]
        match = longest_match(seen)
        if match is None:
            continue
        for guess, token in zip(seen[match.next :], text[start:], strict=False):
            _add(guesses[match.length - 1], guess == token)
            if guess != token:
                break
