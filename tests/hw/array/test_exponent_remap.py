# SPDX-License-Identifier: Apache-2.0
"""The exponent-remap unit against the number format."""

import pytest

from speq.model.number_format import SPLITS
from speq.sim.benches import exponent_remap


@pytest.mark.parametrize("split", SPLITS)
def test_every_word_and_base(split: int) -> None:
    exponent_remap.run(split)
