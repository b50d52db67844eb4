# SPDX-License-Identifier: Apache-2.0
"""The PE against exact sums."""

import pytest

from speq.model.number_format import SPLITS, FormatConfig
from speq.sim.benches import pe

_REFERENCE = FormatConfig().split


def test_dual_mode() -> None:
    pe.run(draft=True, split=_REFERENCE)


def test_fp16_only() -> None:
    pe.run(draft=False)


@pytest.mark.parametrize("split", [split for split in SPLITS if split != _REFERENCE])
def test_other_splits(split: int) -> None:
    pe.run(draft=True, split=split, macs=250_000)
