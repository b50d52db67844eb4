# SPDX-License-Identifier: Apache-2.0
"""The rounder against integer arithmetic."""

from speq.sim.benches import rounder


def test_every_cycle() -> None:
    rounder.run()
