# SPDX-License-Identifier: Apache-2.0
"""The array against the golden arithmetic, cycle by cycle."""

import pytest

from speq.hw import EngineConfig
from speq.model.number_format import FormatConfig
from speq.sim.benches import array


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(rows=3, cols=2, max_k=200),
        EngineConfig(rows=2, cols=3, draft_rows=2, max_k=200, format=FormatConfig(32, 0)),
        EngineConfig(rows=4, cols=1, draft_rows=0, max_k=200),
        EngineConfig(rows=1, cols=1, max_k=200),
    ],
    ids=["one row drafts", "all rows draft", "baseline", "one PE"],
)
def test_random_tiles(config: EngineConfig) -> None:
    array.run(config)
