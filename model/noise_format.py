# SPDX-License-Identifier: Apache-2.0
"""The numbers of the sampling noise: constants of its generator, tables of its logarithms.

`speq.model.gumbel` defines the noise with them, and the hardware is generated from them. A table
entry holds a polynomial of degree 2 over one of `SEGMENTS` equal parts of the argument's range, as
integers in units of 2^-`FRACTION_BITS`: at the place r / 2^`PLACE_BITS` in the part its value is

    c0 + (((c1 + ((c2 r) >> PLACE_BITS)) r) >> PLACE_BITS)

with shifts that round down. It runs through the function at the three Chebyshev nodes of the part,
plus what the two shifts lose on average, and is computed in decimals, so that its integers are the
same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal
from functools import cache

#: Philox4x32-10: multipliers, what each round adds to the key, and rounds.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

#: Fraction bits of logarithms, and those of the noise that is made of them.
FRACTION_BITS, NOISE_FRACTION_BITS = 24, 18
#: Bits of an argument that choose the part of a table, and those behind them.
SEGMENT_BITS, PLACE_BITS = 6, 16
SEGMENTS = 1 << SEGMENT_BITS
#: ln 2 in units of 2^-FRACTION_BITS, by chance exact to 5 more bits.
LN_2 = 11629080

#: Three integers for each part.
Table = tuple[tuple[int, int, int], ...]

_CONTEXT = Context(prec=40)
#: cos(pi / 6) / 2, the distance of the outer Chebyshev nodes from the middle of a part.
_NODE = Decimal("0.4330127018922193233818615853764680917357")


@cache
def logarithm_table() -> Table:
    """ln(m) for m in [1, 2)."""
    return _table(lambda place: _CONTEXT.ln(1 + place))


@cache
def correction_table() -> Table:
    """ln(-ln(1 - u) / u) for u in [0, 1/2)."""

    def correction(place: Decimal) -> Decimal:
        u = place / 2
        return _CONTEXT.ln(_CONTEXT.divide(-_CONTEXT.ln(1 - u), u))

    return _table(correction)


def _table(function: Callable[[Decimal], Decimal]) -> Table:
    """The polynomials of a function of [0, 1)."""
    half, unit = Decimal("0.5"), Decimal(1 << FRACTION_BITS)
    entries = []
    for segment in range(SEGMENTS):
        nodes = (half - _NODE, half, half + _NODE)
        values = [function((segment + node) / SEGMENTS) * unit for node in nodes]
        # Newton's divided differences, then the powers of the place.
        first = [(values[i + 1] - values[i]) / _NODE for i in (0, 1)]
        c2 = (first[1] - first[0]) / (2 * _NODE)
        c1 = first[0] - c2 * (nodes[0] + nodes[1])
        c0 = values[0] - c1 * nodes[0] - c2 * nodes[0] ** 2
        # The inner shift loses half a unit, of which r / 2^PLACE_BITS, on average 1/2, counts.
        c0 += half + half / 2
        entries.append((round(c0), round(c1), round(c2)))
    return tuple(entries)
