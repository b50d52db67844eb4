# SPDX-License-Identifier: Apache-2.0
"""The generator of random bits against the golden function."""

from __future__ import annotations

import pytest

from speq.hw.sampling.philox import Philox
from speq.sim.benches import philox


def test_every_call() -> None:
    philox.run()


@pytest.mark.parametrize("rounds", [0, 3, 20])
def test_rounds_that_do_not_divide_are_refused(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"rounds is {rounds}; expected a divisor of 10"):
        Philox(rounds)
