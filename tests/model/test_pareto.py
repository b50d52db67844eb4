# SPDX-License-Identifier: Apache-2.0
"""The Pareto front against its definition, point by point."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speq.model.pareto import pareto_front


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """By the definition."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


# Few values, so that many numbers are equal.
@given(st.lists(st.tuples(*3 * [st.integers(0, 4).map(float)]), max_size=30))
def test_it_is_what_nothing_dominates(points):
    expected = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert pareto_front(points) == expected


@given(st.lists(st.tuples(*2 * [st.floats(-1e9, 1e9)]), min_size=1, max_size=20))
def test_everything_else_is_dominated_by_it(points):
    front = pareto_front(points)
    for i, point in enumerate(points):
        assert i in front or any(dominates(points[j], point) for j in front)


def test_small_ones():
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (2.0, 1.0)]) == [0, 1, 3]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        pareto_front([(1.0, 2.0), (1.0,)])
