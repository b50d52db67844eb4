# SPDX-License-Identifier: Apache-2.0
"""Tables of policies against counts worked by hand, and the choice of limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from speq.model.emulation import Chains, Text
from speq.model.evaluation import Costs, Sample, run_sample, speedup
from speq.model.policy_fit import LIMITS, best_policy, fit_tables
from speq.model.settings import NO_GUESS
from tests.model.small_models import small_config

COSTS = Costs(small_config(), plain=100.0, draft=25.0, verify=101.0)


def sample(prompt: list[int], tokens: list[int], drafted: list, scores: list) -> Sample:
    nothing = torch.empty(0)
    chains = Chains(torch.tensor(drafted), torch.tensor(scores))
    return Sample("chat", Text(prompt, tokens, nothing, nothing), chains)


def cost(happened: int, tried: int, prior: float = 0.5) -> int:
    return round(-16 * math.log2((happened + prior) / (tried + 1)))


def test_tables_by_hand():
    """Two positions of two passes. Gaps of 1 have index 6, of 4 index 10, of 0.1 index 0."""
    one = sample(
        [50, 51],
        [1, 2],
        # From the root: 1 right, then 9 wrong and 2 beside it. Then: 2 right, nothing behind it.
        [[[1, 7, 8], [9, 2, 7]], [[2, 9, 8], [9, 8, 7]]],
        [[[4.0, 0.0, -math.inf], [3.0, 2.0, -1.0]], [[3.0, 2.0, 2.9], [0.0, 0.0, 0.0]]],
    )
    policy = fit_tables([one])
    chain = [cost(0, 0)] * 16
    # Index 10: right once. Index 6: 9 wrong, 2 right. Those behind take no more than those before.
    chain[6:] = [min(cost(1, 2), chain[0])] * 10
    chain[10:] = [cost(1, 1)] * 6
    assert list(policy.chain_costs) == chain
    # Index 6: 2 right, 9 wrong; 10: 7 and 7 wrong; 0: 8 wrong.
    alternates = [cost(0, 1)] * 6 + [max(cost(1, 2), cost(0, 1))] * 4 + [cost(0, 2)] * 6
    assert list(policy.alternate_costs) == alternates
    assert policy.guess_costs == (cost(0, 0, 0.25),) * 4


def test_guesses_by_hand():
    """1 2 3 again and again, from the fourth token on by matches of 1, 2, 3 and then 4."""
    text = [1, 2, 3] * 3
    nothing = [[[0, 9]]] * 8, [[[0.0, -9.0]]] * 8
    policy = fit_tables([sample(text[:1], text[1:], *nothing)])
    # Behind 1 2 3 1 the match of one token is followed by 2 3 1, all right, and so on.
    counts = {1: 3, 2: 3, 3: 3, 4: 2 + 1}
    behind = {1: cost(counts[1], counts[1], 0.25)}
    for length in (2, 3, 4):
        behind[length] = min(behind[length - 1], cost(counts[length], counts[length], 0.25))
    assert policy.guess_costs == tuple(behind.values())
    forgetful = fit_tables([sample(text[:1], text[1:], *nothing)], history=2)
    assert forgetful.guess_costs == (cost(0, 0, 0.25),) * 4


def test_limits_are_the_best():
    """On chains of which every third token is wrong at a small margin, in a text that repeats."""
    texts = []
    for seed in range(4):
        words = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
        tokens = (words[:7] * 2 + words[7:11]) * 2
        drafted, scores = [], []
        for p in range(len(tokens)):
            rows, values = [], []
            for j in range(7):
                token = tokens[p + j] if p + j < len(tokens) else 99
                wrong = (p + j) % 3 == 0
                rows.append([98, token] if wrong else [token, 98])
                values.append([1.0, 0.5 if wrong else -5.0])
            drafted.append(rows)
            scores.append(values)
        texts.append(sample([words[0]], tokens, drafted, scores))
    best = best_policy(texts, COSTS, 8, 2)
    reached = speedup(texts, best, COSTS)
    assert best.threshold == 0 and best.length == 7 and best.history == 2048
    for limit in LIMITS:
        for bound in (0, *(c + 1 for c in best.policy.guess_costs)):
            other = replace(best.policy, limit=limit, guess_limit=bound)
            # The guess limit is chosen at the best limit without it, so that others may be better.
            if bound == best.policy.guess_limit:
                assert speedup(texts, replace(best, policy=other), COSTS) <= reached
    drafting = best_policy(texts, COSTS, 8, 2, free_steps=False)
    plain = best_policy(texts, COSTS, 8, 2, guesses=False)
    assert drafting.policy.guess_limit == 0 and drafting.policy.guesses
    assert plain.policy.guess_costs == (NO_GUESS,) * 4
    speeds = [speedup(texts, settings, COSTS) for settings in (plain, drafting, best)]
    assert speeds == sorted(speeds) and speeds[0] < speeds[2]
    assert sum(run_sample(text, best, COSTS).statistics.free_steps for text in texts)


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="no texts to fit a policy to"):
        fit_tables([])
    with pytest.raises(ValueError, match="no texts"):
        best_policy([], COSTS, 8, 4)
