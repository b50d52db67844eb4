# SPDX-License-Identifier: Apache-2.0
"""The floating-point units against NumPy and SoftFloat."""

import pytest

from speq.sim.benches import floating_point


def test_every_cycle() -> None:
    floating_point.run()


@pytest.mark.slow
def test_every_cycle_is_softfloats() -> None:
    floating_point.run(softfloat=True)
