# SPDX-License-Identifier: Apache-2.0
"""Comparison of RTL outputs with the golden model's, and the report of a mismatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsInt

import numpy as np

_REPORTED = 4


def mismatched_bits(expected: np.ndarray, got: np.ndarray) -> int:
    """Number of bits in which two arrays of the same unsigned type and shape differ."""
    return int(np.bitwise_count(expected ^ got).sum())


def assert_equal_bits(
    unit: str,
    *,
    expected: np.ndarray,
    got: np.ndarray,
    operands: Mapping[str, np.ndarray] | None = None,
    cycles: np.ndarray | None = None,
) -> None:
    """Compare outputs bit for bit.

    Parameters
    ----------
    unit : str
        Name of the unit and output, for the report.
    expected, got : unsigned integer arrays, or arrays of Python integers, of one shape
    operands : arrays that broadcast to that shape, optional
        What the output was computed from.
    cycles : integer array that broadcasts to that shape, optional
        Clock cycle of each output; its index along the first axis when not given.

    Raises
    ------
    AssertionError
        If any bit differs: unit, cycle, operands, expected and got in hex of the first few.
    """
    assert got.shape == expected.shape, f"{unit}: shape {got.shape}, expected {expected.shape}"
    wrong = np.argwhere(np.asarray(expected != got))
    if not len(wrong):
        return
    lines = [f"{unit}: {len(wrong)} of {got.size} outputs differ"]
    for place in map(tuple, wrong[:_REPORTED]):
        cycle = place[0] if cycles is None else np.broadcast_to(cycles, got.shape)[place]
        given = ", ".join(
            f"{name} {_hex(np.broadcast_to(values, got.shape)[place])}"
            for name, values in (operands or {}).items()
        )
        lines.append(
            f"  cycle {cycle}, index {list(map(int, place))}: {given}{', ' if given else ''}"
            f"expected {_hex(expected[place])}, got {_hex(got[place])}"
        )
    raise AssertionError("\n".join(lines))


def _hex(value: SupportsInt) -> str:
    return f"{int(value):#x}"
