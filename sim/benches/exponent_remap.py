# SPDX-License-Identifier: Apache-2.0
"""Testbench of the exponent-remap unit: every stored word with every base exponent.

The design under test holds one unit per base exponent, all fed with the same word, so that each
word takes one cycle of the simulator.
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


def _config() -> EngineConfig:
    return EngineConfig(format=FormatConfig(split=int(os.environ["SPEQ_SPLIT"])))


def run(split: int) -> None:
    """Check the unit for one split."""
    unit = ExponentRemap(EngineConfig(format=FormatConfig(split=split)))
    level_bits = len(unit.levels.as_value())
    instances = "".join(
        f"  unit u{base} (.word(word), .base(5'd{base}), .fp16(fp16[{base} * 16 +: 16]), "
        f".levels(levels[{base} * {level_bits} +: {level_bits}]));\n"
        for base in range(_BASES)
    )
    top = (
        f"module exponent_remap_tb (input [15:0] word, output [{_BASES * 16 - 1}:0] fp16, "
        f"output [{_BASES * level_bits - 1}:0] levels);\n{instances}endmodule\n"
    )
    verilog = top + convert_unit(unit, "unit", reset=False)
    simulate(verilog, "exponent_remap_tb", __name__, environment={"SPEQ_SPLIT": str(split)})


@cocotb.test()
async def every_word_and_base(dut: Any) -> None:
    """fp16 against `unmap`, levels against `draft_levels`."""
    config = _config()
    decoded = np.empty((_WORDS, _BASES), np.uint16)
    levels = []
    for word in range(_WORDS):
        dut.word.value = word
        await Timer(1, "ns")
        decoded[word] = np.frombuffer(dut.fp16.value.to_bytes(byteorder="little"), np.uint16)
        levels.append(int(dut.levels.value))
    words = np.arange(_WORDS, dtype=np.uint16)[:, None]
    bases = np.arange(_BASES)[None]
    assert_equal_bits(
        "ExponentRemap.fp16",
        expected=unmap(np.broadcast_to(words, decoded.shape), bases, config.format),
        got=decoded,
        operands={"word": words, "base": bases},
    )
    level_bits = LANE_BITS + config.level_shift_bits + 1
    table = [_level_bits(nibble, config) for nibble in range(16)]
    for word, got in enumerate(levels):
        unit = sum(table[word >> 4 * i & 15] << i * level_bits for i in range(DRAFT_LANES))
        expected = sum(unit << base * level_bits * DRAFT_LANES for base in range(_BASES))
        assert got == expected, (
            f"ExponentRemap.levels: cycle {word}, word {word:#06x}, expected {expected:#x}, "
            f"got {got:#x}"
        )


def _level_bits(nibble: int, config: EngineConfig) -> int:
    """{negative, shift, significand} of a draft code."""
    level = draft_levels(config.format)[nibble & 7]
    negative = (nibble >> 3) << (LANE_BITS + config.level_shift_bits)
    return negative | level.shift << LANE_BITS | level.significand
