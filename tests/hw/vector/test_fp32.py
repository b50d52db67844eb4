# SPDX-License-Identifier: Apache-2.0
"""The FP32 adder and multiplier against NumPy's float32 and SoftFloat."""

import pytest

from speq.sim.benches import fp32


def test_every_cycle() -> None:
    fp32.run()


@pytest.mark.slow
def test_every_cycle_is_softfloats() -> None:
    fp32.run(softfloat=True)
