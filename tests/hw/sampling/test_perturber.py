# SPDX-License-Identifier: Apache-2.0
"""The perturber and its noise against the golden functions."""

from speq.sim.benches import perturber


def test_products() -> None:
    perturber.run()
