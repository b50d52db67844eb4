# SPDX-License-Identifier: Apache-2.0
"""The largest score and the sum of the softmax weights of a row against NumPy."""

from speq.sim.benches import row_reductions


def test_every_cycle() -> None:
    row_reductions.run()
