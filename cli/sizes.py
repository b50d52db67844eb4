# SPDX-License-Identifier: Apache-2.0
"""What configurations of the accelerator take, without a synthesis of each.

A configuration's size is the sum of its units that have been measured (`speq.cli.unit_sizes`), of
which there are more or fewer: PEs, rounders, lanes, and on an FPGA the readers of weights and of
operands, whatever their ports. Writers, control, stores and scratch memory are not in it, so that
what is too large is so for certain, but not what fits. Of FPGAs only the mapping for UltraScale+
has been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from speq.cli.fpga import KINDS, PARTS, USABLE_LUTS, Part, Taken
from speq.cli.unit_sizes import AREAS, MEASURED
from speq.host.exploration import Configuration
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.vector.lane import SHARING

_FAMILY = "UltraScale+"
#: MHz of the slowest unit that `speq timing` has measured, on an ECP5-85F of speed grade 6 and in
#: SKY130 HD.
_PART_CLOCK, _AREA_CLOCK = 80.0, 227.0
#: What sizes are of, and are not.
_COUNTED_AREA = "array and lanes"
_NOT_IN_AREA = "readers, writers, control, memories and wires"
_COUNTED_PART = "array, lanes and readers of weights and operands"
_NOT_IN_PART = "writers, control, stores and scratch memory"


def _cols(config: AcceleratorConfig) -> int:
    return config.engine.cols


def _lanes(config: AcceleratorConfig) -> int:
    return config.lanes


#: How many there are of each measured unit.
_COUNTS: dict[str, Callable[[AcceleratorConfig], float]] = {
    "pe_fp16": lambda config: (config.engine.rows - config.engine.draft_rows) * config.engine.cols,
    "pe_dual": lambda config: config.engine.draft_rows * config.engine.cols,
    "rounder": _cols,
    "exponent_remap": _cols,
    "lane": _lanes,
    "shared_sigmoid": lambda config: config.lanes / SHARING,
    "fp32_to_fp16": _lanes,
    "weight_reader": lambda _: 1,
    "operand_reader": lambda _: 2,
}


def area(config: AcceleratorConfig) -> float:
    """Square millimetres of SKY130 HD's cells in array and lanes, without wires."""
    return sum(area * _COUNTS[name](config) for name, area in AREAS.items()) / 1e6


def taken(config: AcceleratorConfig) -> Taken:
    """What the measured units of a configuration with lanes take of an UltraScale+."""
    total = Taken()
    for name, figures in MEASURED.items():
        for kind, figure in zip(KINDS, figures, strict=True):
            total.kinds[kind] += figure * _COUNTS[name](config)
    return total


def chosen_part(name: str | None) -> Part | None:
    """The part whose name begins so.

    Raises
    ------
    ValueError
        If there is none, or its family has not been measured.
    """
    if name is None:
        return None
    found = [part for part in PARTS if part.name.lower().startswith(name.lower())]
    measured = ", ".join(part.name for part in PARTS if part.family == _FAMILY)
    if len(found) != 1:
        raise ValueError(f"there is no part {name!r}; choose from {measured}")
    if found[0].family != _FAMILY:
        raise ValueError(
            f"units have not been measured on the family of {found[0].name}: choose from {measured}"
        )
    return found[0]


@dataclass(frozen=True)
class Limit:
    """What configurations have to fit: a part, or so many mm², by default any number of them.

    Raises
    ------
    ValueError
        If there are both.
    """

    part: Part | None = None
    area: float | None = None

    def __post_init__(self) -> None:
        if self.part and self.area:
            raise ValueError("--part and --area exclude each other")

    @property
    def clock(self) -> float:
        """MHz, if nothing else is said."""
        return _PART_CLOCK if self.part else _AREA_CLOCK

    @property
    def clock_source(self) -> str:
        """What that is the clock of."""
        slowest = "as measured of the slowest unit"
        return f"{slowest} on an ECP5-85F" if self.part else f"{slowest} in SKY130 HD"

    @property
    def name(self) -> str:
        """Of the part or the cells."""
        return self.part.name if self.part else "SKY130 HD"

    @property
    def heading(self) -> str:
        """What sizes are, for a table."""
        return "of the\npart" if self.part else "mm²"

    @property
    def axis(self) -> str:
        """What sizes are, for a plot."""
        if self.part:
            return f"share of what is scarcest of {self.name}: array, lanes, readers"
        return f"area of {_COUNTED_AREA}, mm² of {self.name}"

    @property
    def counted(self) -> str:
        """What is in the sizes and what is not."""
        if self.part:
            return (
                f"{_COUNTED_PART} by Yosys for {_FAMILY}; {_NOT_IN_PART} come on top "
                "(speq resources)"
            )
        return f"cells of {_COUNTED_AREA} in {self.name}; {_NOT_IN_AREA} come on top"

    def size(self, configuration: Configuration) -> float:
        """Of what is scarcest of the part the share that is taken; else mm²."""
        config = configuration.accelerator()
        return max(taken(config).shares(self.part).values()) if self.part else area(config)

    def shown(self, size: float) -> str:
        """A size for people."""
        return f"{size:.0%}" if self.part else f"{size:.3g}"

    def fitting(self, configurations: Iterable[Configuration]) -> dict[Configuration, float]:
        """Those that fit, with their sizes.

        Raises
        ------
        ValueError
            If none does; it says what the smallest lacks.
        """
        sizes = {c: self.size(c) for c in configurations}
        fits = {c: size for c, size in sizes.items() if self._fits(c, size)}
        if not fits:
            smallest = min(sizes, key=lambda c: sizes[c])
            raise ValueError(
                f"none of {len(sizes)} configurations fits: the smallest, {smallest.name}, takes "
                f"{self._lacks(smallest, sizes[smallest])}"
            )
        return fits

    def _fits(self, configuration: Configuration, size: float) -> bool:
        if self.part:
            return taken(configuration.accelerator()).fits(self.part)
        return self.area is None or size <= self.area

    def _lacks(self, configuration: Configuration, size: float) -> str:
        if self.part is None:
            return f"{size:.3g} of {self.area:g} mm²"
        has = self.part.has | {"LUT": USABLE_LUTS * self.part.has["LUT"]}
        kinds = taken(configuration.accelerator()).kinds
        lacks = (
            f"{kinds[kind]:,.0f} {kind} of {has[kind]:,.0f} that {self.name} has for it"
            for kind in KINDS
            if kinds[kind] > has[kind]
        )
        return " and ".join(lacks)
