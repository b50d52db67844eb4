# SPDX-License-Identifier: Apache-2.0
"""The rounder against integer arithmetic."""

import pytest

from speq.hw.engine_config import EngineConfig
from speq.model.number_format import FormatConfig
from speq.sim.benches import rounder

CONFIGS = {
    "reference": EngineConfig(),
    "narrowest": EngineConfig(draft_rows=0, max_k=1),
    "widest": EngineConfig(format=FormatConfig(split=0), max_k=2**16),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_cycle(config: EngineConfig) -> None:
    rounder.run(config)
