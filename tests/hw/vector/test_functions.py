# SPDX-License-Identifier: Apache-2.0
"""Exponential, sigmoid, reciprocal and root against the golden model's."""

from speq.sim.benches import vector_functions


def test_every_cycle() -> None:
    vector_functions.run()
