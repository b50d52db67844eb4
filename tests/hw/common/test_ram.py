# SPDX-License-Identifier: Apache-2.0
"""The RAM against an array."""

from speq.sim.benches import ram


def test_random_accesses() -> None:
    ram.run()
