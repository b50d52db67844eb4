# SPDX-License-Identifier: Apache-2.0
"""Figures of speculation against counts worked by hand on made-up texts and chains."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from speq.model.cycles import (
    Engine,
    draft_pass,
    kv_bytes,
    linear_shapes,
    plain_pass,
    uniform_formats,
    verify_pass,
)
from speq.model.emulation import Chains, Text
from speq.model.evaluation import (
    THRESHOLDS,
    Costs,
    Sample,
    acceptance_by_position,
    best_settings,
    bootstrap_ratio,
    by_kind,
    counted_costs,
    encoded_costs,
    exponent_counts,
    length_curve,
    run_sample,
    speedup,
    threshold_curve,
)
from speq.model.format import encode, unpack_draft
from speq.model.number_format import FormatConfig, remap_table
from speq.model.speculation import Settings
from tests.model.small_models import small_config

SEED = int(os.environ.get("SPEQ_SEED", "0"))
CONFIG = small_config()
COSTS = Costs(CONFIG, plain=100.0, draft=25.0, verify=101.0)
WRONG = 99


def sample(
    tokens: list[int], rows: list[list[list[int]]], margins: list[list[float]], kind: str = "chat"
) -> Sample:
    """A text behind a prompt of 5 tokens, and choices [P][L][C] whose best is ahead of each of
    the others by margins [P][L]."""
    scores = [
        [[0.0] + [-margin - 0.01 * c for c in range(len(choices) - 1)] for choices, margin in pairs]
        for pairs in map(zip, rows, margins)
    ]
    nothing = torch.empty(0)
    text = Text([1, 2, 3, 4, 5], tokens, nothing, nothing)
    return Sample(kind, text, Chains(torch.tensor(rows), torch.tensor(scores)))


def made_up(
    tokens: list[int], right: list[bool], length: int = 3, margin: float = 5.0, kind: str = "chat"
) -> Sample:
    """Chains that are right about token p where right[p], whatever comes before. The second choice
    is right where the first is not; margins are `margin` where right, else 1."""
    rows, margins = [], []
    for p in range(len(tokens)):
        row, gaps = [], []
        for j in range(length):
            known = p + j < len(tokens)
            good = known and right[p + j]
            token = tokens[p + j] if known else WRONG
            row.append([token, WRONG] if good else [WRONG, token])
            gaps.append(margin if good else 1.0)
        rows.append(row)
        margins.append(gaps)
    return sample(tokens, rows, margins, kind)


TOKENS = [10, 11, 12, 13, 14, 15, 16, 17]
RIGHT = [True, True, False, True, True, True, False, True]


def test_chain_by_hand():
    """Steps: 10 11 | 12 | (wrong third token), then 13 14 15 | 16, then 17 without a draft."""
    run = run_sample(made_up(TOKENS, RIGHT), Settings(8, 3, 0.0, 1), COSTS)
    s = run.statistics
    assert (s.verify_passes, s.draft_passes, s.committed) == (3, 3 + 3 + 0, 8)
    assert (s.accepted, s.compared) == (2 + 3, 3 + 3)
    assert run.early_exits == 0
    assert (run.matches, run.positions) == (6, 8)
    assert (run.plain, run.spent) == (800.0, 6 * 25.0 + 3 * 101.0)


def test_early_exits_by_hand():
    """The margin of 1 at the wrong tokens ends the chains behind them."""
    run = run_sample(made_up(TOKENS, RIGHT), Settings(8, 3, 2.0, 1), COSTS)
    assert run.statistics.draft_passes == 3 + 3
    assert run.early_exits == 0  # both chains had their full length anyway
    run = run_sample(made_up(TOKENS, RIGHT, length=5), Settings(8, 5, 2.0, 1), COSTS)
    # 10 11 x (of up to 5), then 13 14 15 x (of 4, the last token is the target's).
    assert run.statistics.draft_passes == 3 + 4
    assert run.early_exits == 2


def test_alternates_by_hand():
    """The second choices repair 12 and 16: 10 11 12 13, then 14 15 16 17."""
    run = run_sample(made_up(TOKENS, RIGHT), Settings(8, 3, 0.0, 2), COSTS)
    s = run.statistics
    assert (s.verify_passes, s.draft_passes, s.committed, s.alternate_hits) == (2, 6, 8, 2)
    assert s.alternates == 6
    # The second pass's context is the prompt but its last token, and four tokens.
    plain = sum(kv_bytes(CONFIG, 4 + i, 1) for i in range(8))
    drafts = [kv_bytes(CONFIG, start + i, 1) for start in (4, 8) for i in range(3)]
    verifies = kv_bytes(CONFIG, 4, 1 + 3 + 3) + kv_bytes(CONFIG, 8, 1 + 3 + 3)
    assert run.plain_kv - run.plain == plain
    assert run.spent_kv - run.spent == sum(drafts) + verifies


def test_figures_by_kind():
    samples = [
        made_up(TOKENS, RIGHT, kind="story"),
        made_up(TOKENS, [True] * 8, kind="code"),
        made_up(TOKENS, [False] * 8, kind="code"),
    ]
    settings = Settings(8, 3, 0.0, 1)
    figures = by_kind(samples, settings, COSTS, SEED)
    assert list(figures) == ["story", "code", "all"]
    code = figures["code"]
    # All right: 4 + 4 tokens for 3 + 3 drafts. All wrong: 8 passes with 3 3 3 3 3 2 1 0 drafts.
    assert (code.prompts, code.tokens) == (2, 16)
    assert code.match_rate == 0.5
    assert code.acceptance_length == 6 / 10
    assert code.tokens_per_pass == 1.6
    assert code.drafted == (6 + 18) / 10
    assert code.speedup.value == pytest.approx(1600 / (24 * 25 + 10 * 101))
    everything = figures["all"]
    assert everything.speedup.value == pytest.approx(speedup(samples, settings, COSTS))
    assert everything.speedup.low < everything.speedup.value < everything.speedup.high
    # Drafts read the KV cache as often as a plain pass does, so it lowers this speedup.
    assert everything.speedup_kv.value < everything.speedup.value
    story = figures["story"].speedup
    assert story.low == story.value == story.high  # one prompt: nothing to resample
    assert by_kind(samples, settings, COSTS, SEED) == figures


def test_texts_without_drafts():
    one = by_kind([made_up([7], [True])], Settings(8, 3, 0.0, 1), COSTS, SEED)["all"]
    assert math.isnan(one.acceptance_rate) and one.match_rate == 1.0
    assert one.speedup.value == pytest.approx(100 / 101)


def test_bootstrap_interval():
    """Against the normal approximation, of which the bootstrap of a mean of many is an example."""
    rng = np.random.default_rng(SEED)
    over, under = rng.normal(2, 0.5, 400), np.ones(400)
    estimate = bootstrap_ratio(over, under, SEED)
    half = 1.96 * over.std() / 20
    assert estimate.value == pytest.approx(over.mean())
    assert estimate.low == pytest.approx(over.mean() - half, abs=0.2 * half)
    assert estimate.high == pytest.approx(over.mean() + half, abs=0.2 * half)
    assert bootstrap_ratio(over, under, SEED) == estimate
    assert bootstrap_ratio(over, under, SEED + 1) != estimate
    # Pairs are drawn together: where every ratio is 2, so is that of every resample.
    proportional = bootstrap_ratio(2 * over, over, SEED)
    assert proportional.low == pytest.approx(2) and proportional.high == pytest.approx(2)


def test_best_settings():
    tokens = list(range(20, 50))
    right = best_settings([made_up(tokens, [True] * 30, length=5)], COSTS, choices=1)
    assert (right.length, right.threshold, right.rows, right.choices) == (5, 0.0, 8, 1)
    wrong = best_settings([made_up(tokens, [False] * 30, length=5)], COSTS, choices=1)
    assert wrong.length == 1
    # Drafts that are wrong with small margins only: stop there, never before.
    mixed = made_up(tokens, [p not in (1, 2, 7, 13, 15, 22) for p in range(30)], length=5)
    chosen = best_settings([mixed], COSTS, choices=1)
    assert 1.0 < chosen.threshold <= 5.0 and chosen.length == 5
    assert best_settings([mixed], COSTS, rows=3, choices=1).length == 2
    with pytest.raises(ValueError, match="no texts to choose settings on"):
        best_settings([], COSTS)


def test_curves_are_the_speedups_of_single_settings():
    samples = [made_up(TOKENS, RIGHT)]
    settings = Settings(8, 2, 1.5, 2)
    lengths = length_curve(samples, settings, COSTS)
    assert (lengths.values, lengths.chosen) == ([1, 2, 3], 2)
    assert lengths.speedups[2] == speedup(samples, Settings(8, 3, 1.5, 2), COSTS)
    thresholds = threshold_curve(samples, settings, COSTS)
    assert (thresholds.values, thresholds.chosen) == (list(THRESHOLDS), 1.5)
    index = THRESHOLDS.index(5.0)
    assert thresholds.speedups[index] == speedup(samples, Settings(8, 2, 5.0, 2), COSTS)


def test_acceptance_by_position():
    """Chains from 8 positions; position 1 of chain p is about token p, and so on."""
    got = acceptance_by_position([made_up(TOKENS, RIGHT)])
    # RIGHT of the first token: 6 of 8. Alive and with a second token: p = 0, 1, 3, 4, 5 (7 ends).
    assert got.reached == [8, 5, 3]
    # Of these, second tokens 11 (right), 12 (wrong), 14, 15 (right), 16 (wrong).
    # Third tokens behind p = 0, 3, 4: 12 (wrong), 15 (right), 16 (wrong).
    assert got.first == [6 / 8, 3 / 5, 1 / 3]
    assert got.among == {2: [1.0, 1.0, 1.0]}
    assert got.survival == [6 / 8, 3 / 7, 1 / 6]


def test_costs_count_everything():
    formats = uniform_formats(CONFIG, FormatConfig())
    costs = counted_costs(CONFIG, formats)
    engine = Engine()
    plain = plain_pass(CONFIG, engine).weights
    draft, verify = draft_pass(CONFIG, engine, formats), verify_pass(CONFIG, engine, formats, 1)
    expected = ((draft.weights + draft.groups) / plain, (verify.weights + verify.groups) / plain)
    assert costs.relative == expected
    fewer = counted_costs(CONFIG, formats, drafted_outputs=16)
    assert fewer.draft < costs.draft and fewer.verify == costs.verify


def test_costs_of_encoded_tensors():
    shapes = linear_shapes(CONFIG)
    formats = uniform_formats(CONFIG, FormatConfig())
    encoded = {
        name: encode(torch.ones(shape, dtype=torch.float16), formats[name], name=name)
        for name, shape in shapes.items()
    }
    assert encoded_costs(CONFIG, encoded) == counted_costs(CONFIG, formats)
    some = {**encoded, "head": replace(encoded["head"], drafted_outputs=37)}
    for reranked in (0, 3):
        draft = draft_pass(CONFIG, Engine(), formats, 0, 37, reranked)
        costs = encoded_costs(CONFIG, some, reranked)
        assert costs.draft == draft.weights + draft.groups
        assert costs.verify == encoded_costs(CONFIG, encoded).verify
    del encoded["head"], formats["head"]
    assert encoded_costs(CONFIG, encoded) == counted_costs(CONFIG, formats)


def test_exponent_counts_by_hand():
    """Exponents 0, 1 and 3 below the base; top mantissa bits of 1.0, 1.5, 1.75 and 1.25."""
    row = [1.0, -1.5, 0.875, 0.15625]
    counts = exponent_counts(torch.tensor([row], dtype=torch.float16), 32)
    expected = np.zeros((32, 2), int)
    expected[0] = 1, 1
    expected[1, 1] = 1
    expected[3, 0] = 1
    assert (counts == expected).all()


@pytest.mark.parametrize("split", [0, 2])
def test_exponent_counts_agree_with_the_encoder(split):
    """Summed over the remap's classes, they are the numbers of the draft codes."""
    config = FormatConfig(group=32, split=split)
    rng = np.random.default_rng(SEED)
    weights = torch.from_numpy(rng.standard_t(3, (7, 100)).astype(np.float16))
    counts = exponent_counts(weights, 32)
    table = remap_table(split)
    classes = np.zeros(8, int)
    for t in range(32):
        for half in (0, 1):
            classes[table[t << 1 | half] >> 3] += counts[t, half]
    encoded = encode(weights, config, columns=1)
    codes = unpack_draft(encoded.draft_plane[:, :, 0], 100)
    assert classes.tolist() == np.bincount((codes & 7).reshape(-1), minlength=8).tolist()
