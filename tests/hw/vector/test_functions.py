# SPDX-License-Identifier: Apache-2.0
"""Exponential, sigmoid, reciprocal and root against the golden model's."""

import pytest

from speq.sim.benches import vector_functions


def test_every_cycle() -> None:
    vector_functions.run()


@pytest.mark.slow
def test_every_cycle_of_five_million() -> None:
    vector_functions.run(thorough=True)
