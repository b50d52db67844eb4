# SPDX-License-Identifier: Apache-2.0
"""The noise's transform against the golden function."""

from speq.sim.benches import gumbel_transform


def test_every_value() -> None:
    gumbel_transform.run()
