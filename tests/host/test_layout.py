# SPDX-License-Identifier: Apache-2.0
"""Forms of operands in memory, against the layouts that the hardware is generated from."""

from __future__ import annotations

import pytest
import torch
from amaranth.lib import data

from speq.host.layout import draft_activation_words
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import BLOCK_ACTIVATIONS, DRAFT_LANES, EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.arith import BlockActivations
from speq.sim.runner import seed


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 31, 64, 99])
def test_block_activations_are_in_the_layouts_fields(rows: int, k: int) -> None:
    port = AxiConfig(data_bits=128)
    config = AcceleratorConfig(EngineConfig(rows=4, cols=8, draft_rows=3), port, port)
    random = torch.Generator().manual_seed(seed() + k)
    mantissa = torch.randint(-127, 128, (rows, k), generator=random, dtype=torch.int8)
    exponent = torch.randint(1, 32, (rows, -(-k // 32)), generator=random, dtype=torch.uint8)
    words = draft_activation_words(BlockActivations(mantissa, exponent, 32), config)
    steps = -(-k // DRAFT_LANES)
    assert words.shape[1] == config.activation_bytes
    assert words.size % port.beat_bytes == 0 and not words[steps:].any()
    assert words.size - steps * config.activation_bytes < port.beat_bytes
    layout = data.ArrayLayout(BLOCK_ACTIVATIONS, rows)
    for step, word in enumerate(words[:steps]):
        bits = int.from_bytes(word.tobytes(), "little")
        assert bits < 1 << layout.size
        for row, fields in enumerate(layout.from_bits(bits)):
            assert fields.exponent == exponent[row, step * DRAFT_LANES // 32]
            for i, lane in enumerate(fields.lanes):
                index = step * DRAFT_LANES + i
                value = int(mantissa[row, index]) if index < k else 0
                assert (lane.magnitude, lane.negative) == (abs(value), value < 0)
