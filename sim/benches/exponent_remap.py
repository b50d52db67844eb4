# SPDX-License-Identifier: Apache-2.0
"""Testbench of the exponent-remap unit: every stored word with every base exponent.

The design under test holds one unit per base exponent for each of a few words, so that these words
take one cycle of the simulator, and all that for every split, as building a design takes long.
"""

from __future__ import annotations

from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import Timer

from speq.hw.array.exponent_remap import ExponentRemap
from speq.hw.engine_config import EngineConfig
from speq.hw.verilog import convert_unit
from speq.model.format import unmap
from speq.model.number_format import SPLITS, FormatConfig
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import simulate

_BASES = 32
_WORDS = 1 << 16
#: Words of a cycle.
_TOGETHER = 4


def _config(split: int) -> EngineConfig:
    return EngineConfig(format=FormatConfig(split=split))


def run() -> None:
    """Check the units for all splits."""
    ports, instances, modules = [f"input [{_TOGETHER * 16 - 1}:0] words"], [], []
    units = [(i, i // _BASES, i % _BASES) for i in range(_TOGETHER * _BASES)]
    for split in SPLITS:
        unit = ExponentRemap(_config(split))
        ports.append(f"output [{len(units) * 16 - 1}:0] fp16_{split}")
        instances += [
            f"  unit_{split} u{split}_{i} (.word(words[{word} * 16 +: 16]), .base(5'd{base}), "
            f".fp16(fp16_{split}[{i} * 16 +: 16]));\n"
            for i, word, base in units
        ]
        modules.append(convert_unit(unit, f"unit_{split}", reset=False))
    top = f"module exponent_remap_tb ({', '.join(ports)});\n{''.join(instances)}endmodule\n"
    simulate(top + "".join(modules), "exponent_remap_tb", __name__)


@cocotb.test()
async def every_word_and_base(dut: Any) -> None:
    """fp16 against `unmap`."""
    words = np.arange(_WORDS, dtype=np.uint16)[:, None]
    decoded = {split: bytearray() for split in SPLITS}
    for start in range(0, _WORDS, _TOGETHER):
        dut.words.value = int.from_bytes(words[start : start + _TOGETHER].tobytes(), "little")
        await Timer(1, "ns")
        for split in SPLITS:
            fp16 = getattr(dut, f"fp16_{split}").value
            decoded[split] += fp16.to_bytes(byteorder="little")
    for split in SPLITS:
        fp16 = np.frombuffer(decoded[split], "<u2").reshape(_WORDS, _BASES)
        _check(split, words, fp16)


def _check(split: int, words: np.ndarray, decoded: np.ndarray) -> None:
    """Compare what the units for a split gave: FP16 numbers, uint16 [words, bases]."""
    config = _config(split)
    bases = np.arange(_BASES)[None]
    assert_equal_bits(
        f"ExponentRemap.fp16, split {split}",
        expected=unmap(np.broadcast_to(words, decoded.shape), bases, config.format),
        got=decoded,
        operands={"word": words, "base": bases},
    )
