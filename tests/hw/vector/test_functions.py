# SPDX-License-Identifier: Apache-2.0
"""Exponential, sigmoid, reciprocal and root against the golden model's."""

from __future__ import annotations

import pytest

from speq.hw.vector.parabola import Parabola
from speq.model.function_tables import INVERSE, POWER
from speq.sim.benches import vector_functions


def test_every_cycle() -> None:
    vector_functions.run()


@pytest.mark.filterwarnings("ignore::amaranth.hdl.UnusedElaboratable")
def test_tables_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        Parabola([POWER, INVERSE])
