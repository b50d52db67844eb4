# SPDX-License-Identifier: Apache-2.0
"""A lane of the vector unit against the golden model's operations."""

from speq.sim.benches import lane


def test_every_operation() -> None:
    lane.run()
