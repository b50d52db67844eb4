# SPDX-License-Identifier: Apache-2.0
"""Lint of the vector unit's arithmetic units, each on its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_multiplier import Fp32Multiplier
from tests.hw.verilog_tools import lint, write_unit

UNITS = {"fp32_adder": Fp32Adder, "fp32_multiplier": Fp32Multiplier}


@pytest.mark.parametrize("name", UNITS)
def test_verilator_lints_it_without_a_warning(name: str, tmp_path: Path) -> None:
    source = write_unit(UNITS[name](), name, tmp_path)
    assert lint(name, source) == (0, "")
