# SPDX-License-Identifier: Apache-2.0
"""Testbench of the exponent-remap unit: every stored word with every base exponent.

The design under test holds one unit per base exponent for each of a few words, so that these words
take one cycle of the simulator.
"""

from __future__ import annotations

import os
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import Timer

from speq.hw.array.exponent_remap import ExponentRemap
from speq.hw.engine_config import DRAFT_LANES, LANE_BITS, EngineConfig
from speq.hw.verilog import convert_unit
from speq.model.format import unmap
from speq.model.number_format import FormatConfig, draft_levels
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import simulate

_BASES = 32
_WORDS = 1 << 16
#: Words of a cycle.
_TOGETHER = 4


def _config() -> EngineConfig:
    return EngineConfig(format=FormatConfig(split=int(os.environ["SPEQ_SPLIT"])))


def run(split: int) -> None:
    """Check the unit for one split."""
    unit = ExponentRemap(EngineConfig(format=FormatConfig(split=split)))
    level_bits = len(unit.levels.as_value())
    units = [(i, i // _BASES, i % _BASES) for i in range(_TOGETHER * _BASES)]
    instances = "".join(
        f"  unit u{i} (.word(words[{word} * 16 +: 16]), .base(5'd{base}), "
        f".fp16(fp16[{i} * 16 +: 16]), .levels(levels[{i} * {level_bits} +: {level_bits}]));\n"
        for i, word, base in units
    )
    top = (
        f"module exponent_remap_tb (input [{_TOGETHER * 16 - 1}:0] words, "
        f"output [{len(units) * 16 - 1}:0] fp16, "
        f"output [{len(units) * level_bits - 1}:0] levels);\n"
        f"{instances}endmodule\n"
    )
    verilog = top + convert_unit(unit, "unit", reset=False)
    simulate(verilog, "exponent_remap_tb", __name__, environment={"SPEQ_SPLIT": str(split)})


@cocotb.test()
async def every_word_and_base(dut: Any) -> None:
    """fp16 against `unmap`, levels against `draft_levels`."""
    config = _config()
    level_bits = LANE_BITS + config.level_shift_bits + 1
    bits_of_word = _BASES * DRAFT_LANES * level_bits
    words = np.arange(_WORDS, dtype=np.uint16)[:, None]
    decoded = np.empty((_WORDS, _BASES), np.uint16)
    levels = []
    for start in range(0, _WORDS, _TOGETHER):
        together = slice(start, start + _TOGETHER)
        dut.words.value = int.from_bytes(words[together].tobytes(), "little")
        await Timer(1, "ns")
        fp16 = np.frombuffer(dut.fp16.value.to_bytes(byteorder="little"), np.uint16)
        decoded[together] = fp16.reshape(_TOGETHER, _BASES)
        got = int(dut.levels.value)
        levels += [got >> i * bits_of_word & (1 << bits_of_word) - 1 for i in range(_TOGETHER)]
    bases = np.arange(_BASES)[None]
    assert_equal_bits(
        "ExponentRemap.fp16",
        expected=unmap(np.broadcast_to(words, decoded.shape), bases, config.format),
        got=decoded,
        operands={"word": words, "base": bases},
    )
    table = [_level_bits(nibble, config) for nibble in range(16)]
    every_base = sum(1 << base * level_bits * DRAFT_LANES for base in range(_BASES))
    for word, got in enumerate(levels):
        unit = sum(table[word >> 4 * i & 15] << i * level_bits for i in range(DRAFT_LANES))
        expected = unit * every_base
        assert got == expected, (
            f"ExponentRemap.levels: cycle {word}, word {word:#06x}, expected {expected:#x}, "
            f"got {got:#x}"
        )


def _level_bits(nibble: int, config: EngineConfig) -> int:
    """{negative, shift, significand} of a draft code."""
    level = draft_levels(config.format)[nibble & 7]
    negative = (nibble >> 3) << (LANE_BITS + config.level_shift_bits)
    return negative | level.shift << LANE_BITS | level.significand
