# SPDX-License-Identifier: Apache-2.0
"""The Pareto front: what no other beats in everything."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other dominates, in their order.

    A point dominates another if it is nowhere smaller and somewhere larger. So the larger each
    number the better; points that are equal stay together.

    Parameters
    ----------
    points : sequence of tuples of float
        All of one length, without NaN.
    """
    # Only what comes before a point in falling order can dominate it, and what is dominated at all
    # is dominated by one of the front.
    order = sorted(range(len(points)), key=lambda i: points[i], reverse=True)
    front: list[int] = []
    for i in order:
        point = points[i]
        if not any(
            points[j] != point and all(a >= b for a, b in zip(points[j], point, strict=True))
            for j in front
        ):
            front.append(i)
    return sorted(front)
