# SPDX-License-Identifier: Apache-2.0
"""The PE against exact sums."""

from speq.sim.benches import pe


def test_random_sums() -> None:
    pe.run()
