# SPDX-License-Identifier: Apache-2.0
"""The passes of a run and their predicted cycles."""

from __future__ import annotations

import torch

from speq.host.cycles import predicted_passes
from speq.host.meter import PassShape, passes_of
from speq.hw.accelerator_config import PassKind
from speq.model.loaders import load_model
from speq.model.speculation import Step


def step(tokens: list[int], drafted: int, alternates: int) -> Step:
    """A step that commits these tokens."""
    return Step(tokens, torch.empty(0), drafted, 1, alternates, False, [])


def test_passes_of_steps():
    steps = [step([7, 8], 2, 1), step([9], 0, 0)]
    expected = [
        *[PassShape(PassKind.SINGLE, 4, 0), PassShape(PassKind.SINGLE, 1, 4)],
        *[
            PassShape(PassKind.DRAFT, 1, 5),
            PassShape(PassKind.DRAFT, 1, 6),
            PassShape(PassKind.VERIFY, 4, 5),
        ],
        PassShape(PassKind.VERIFY, 1, 7),
    ]
    assert list(passes_of([0] * 6, steps, 4)) == expected
    names = ["prefill", "prefill", "draft", "draft", "verify", "plain"]
    assert [shape.name for shape in expected] == names


def test_prefill_is_a_pass_without_its_end():
    config = load_model("tiny").config
    passes = predicted_passes(config, {}, rows=4, cols=8, context=8)
    verify, prefill = (
        PassShape(kind, 4, 8).predicted_cycles(passes)
        for kind in (PassKind.VERIFY, PassKind.SINGLE)
    )
    h, f = config.hidden, config.ffn_hidden
    # The last block's attention output and feed-forward layers and the head, 8 outputs a tile; and
    # the vector work with them.
    left_out = h * h / 8 + 3 * h * f / 8 + h * config.vocab_size / 8
    assert left_out < verify - prefill < 1.4 * left_out
