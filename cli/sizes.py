# SPDX-License-Identifier: Apache-2.0
"""What configurations of the accelerator take of an FPGA, without a synthesis of each.

A configuration's size is the sum of its units', and a unit's is that of measured ones
(`speq.cli.unit_sizes`): those in the array and the lanes of the vector unit are the same in all
configurations, and there are more or fewer of them; others grow linearly with what they work on,
such as the width of a port. So far only the mapping for UltraScale+ has been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from speq.cli.fpga import KINDS, PARTS, USABLE_LUTS, Part, Taken
from speq.cli.unit_sizes import AREAS, MEASURED, NOT_COUNTED
from speq.host.exploration import Configuration
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.vector.lane import SHARING

_FAMILY = "UltraScale+"
#: MHz of the slowest unit that `speq timing` has measured, on an ECP5-85F of speed grade 6 and in
#: SKY130 HD.
_PART_CLOCK, _AREA_CLOCK = 73.0, 227.0
#: What sizes are of, and are not.
COUNTED_AREA = "array and lanes"
_NOT_IN_AREA = "readers, writers, control, memories and wires"


#: Units that there is one of, whose size follows the width of the data port, or nothing varied.
_OF_DATA_PORT = (
    *("group_reader", "activation_reader", "vector_writer", "memory_writer", "result_writer"),
    *("entry_mover", "write_mux"),
)
_OTHERS = (
    *("ranker", "perturber", "speculation_controller", "program_walker", "register_file"),
    *("run_control", "row_values", "partial_sums", "token_reader", "activation_quantizer"),
    *("attention_mask", "ranking_writer", "read_arbiter", "memory_watchdog"),
)


@dataclass(frozen=True)
class _Unit:
    """How many of a unit a configuration has, and what their size is linear in; None: nothing."""

    count: Callable[[AcceleratorConfig], float]
    grows: Callable[[AcceleratorConfig], int] | None = None


def _one(_: AcceleratorConfig) -> int:
    return 1


def _cols(config: AcceleratorConfig) -> int:
    return config.engine.cols


def _lanes(config: AcceleratorConfig) -> int:
    return config.lanes


def _weights(config: AcceleratorConfig) -> int:
    return config.weights.data_bits


def _data(config: AcceleratorConfig) -> int:
    return config.data.data_bits


#: The accelerator's units, none of which is in another. What connects them is not among them, nor
#: are the store of activations and the vector core's own sequence.
_UNITS = {
    "exponent_remap": _Unit(_cols),
    "pe_dual": _Unit(lambda config: config.engine.draft_rows * config.engine.cols),
    "pe_fp16": _Unit(
        lambda config: (config.engine.rows - config.engine.draft_rows) * config.engine.cols
    ),
    "rounder": _Unit(_cols),
    "lane": _Unit(_lanes),
    "shared_sigmoid": _Unit(lambda config: config.lanes / SHARING),
    "weight_reader": _Unit(_one, _weights),
    **{name: _Unit(_one, _data) for name in _OF_DATA_PORT},
    "operand_reader": _Unit(lambda _: 2, _data),
    **{name: _Unit(_one) for name in _OTHERS},
}


def area(config: AcceleratorConfig) -> float:
    """Square millimetres of SKY130 HD's cells in `COUNTED_AREA`, without wires."""
    return sum(AREAS[name] * count(config) for name, count in _PARTS_OF_AREA.items()) / 1e6


def taken(config: AcceleratorConfig) -> Taken:
    """What the units of a configuration with lanes take of an UltraScale+."""
    total = Taken()
    for name, figures in MEASURED.items():
        unit = _UNITS[name]
        measured = {
            unit.grows(_measured_config(*sizes)) if unit.grows else 0: kinds
            for sizes, kinds in figures.items()
        }
        here = unit.grows(config) if unit.grows else 0
        for i, kind in enumerate(KINDS):
            one = _linear(here, {x: kinds[i] for x, kinds in measured.items()})
            total.kinds[kind] += unit.count(config) * one
    return total


#: How many there are of what has been measured in SKY130 HD.
_PARTS_OF_AREA: dict[str, Callable[[AcceleratorConfig], float]] = {
    name: _lanes if name == "fp32_to_fp16" else _UNITS[name].count for name in AREAS
}


@cache
def _measured_config(rows: int, cols: int, lanes: int) -> AcceleratorConfig:
    return AcceleratorConfig(EngineConfig(rows, cols), lanes=lanes)


def _linear(x: int, measured: Mapping[int, float]) -> float:
    """The value at x on the line through the first and the last of measured points, at least 0; of
    one point that one."""
    (first, low), (last, high) = min(measured.items()), max(measured.items())
    if first == last:
        return low
    return max(0.0, low + (high - low) * (x - first) / (last - first))


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
            return f"share of what is scarcest of {self.name}"
        return f"area of {COUNTED_AREA}, mm² of {self.name}"

    @property
    def counted(self) -> str:
        """What is in the sizes and what is not."""
        if self.part:
            return f"units as mapped for {_FAMILY}, but not {NOT_COUNTED}"
        return f"cells of {COUNTED_AREA} in {self.name}; {_NOT_IN_AREA} come on top"

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
