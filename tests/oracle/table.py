# SPDX-License-Identifier: Apache-2.0
"""What a check with another implementation yields: rows of one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison: what was compared, the worst difference and what it may be at most."""

    compared: str
    difference: float
    bound: float = 0.0
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.difference <= self.bound  # a NaN is not


@dataclass(frozen=True)
class Check:
    """Comparisons of one case.

    `run` gets a folder to make and write to, and the seed. What it raises is a failure of the
    check. Of the variants of a case, the table has the worst.
    """

    name: str
    run: Callable[[Path, int], Iterator[Row]]
    variant: str = ""
