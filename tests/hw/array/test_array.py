# SPDX-License-Identifier: Apache-2.0
"""The array against the golden arithmetic, cycle by cycle."""

from speq.sim.benches import array


def test_random_tiles() -> None:
    array.run()
