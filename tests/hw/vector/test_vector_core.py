# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the vector unit against the golden model's operations."""

from __future__ import annotations

from pathlib import Path

import pytest

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.engine_config import EngineConfig
from speq.hw.vector.vector_core import VectorCore
from speq.hw.verilog import convert_unit
from speq.sim.benches import vector_core
from tests.hw.verilog_tools import lint


def test_every_operation() -> None:
    vector_core.run("odd_rows")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(vector_core.CONFIGS.keys() - {"odd_rows"}))
def test_every_operation_of_more_lanes(name: str) -> None:
    vector_core.run(name)


@pytest.mark.parametrize(
    "config",
    [
        AcceleratorConfig(EngineConfig(rows=1, cols=4, max_k=1), lanes=4, query_heads=4),
        AcceleratorConfig(EngineConfig(rows=8, cols=32), lanes=4),
    ],
    ids=["smallest", "usual"],
)
def test_verilator_lints_it_without_a_warning(config: AcceleratorConfig, tmp_path: Path) -> None:
    core = VectorCore(config)
    modules = [convert_unit(unit, name, reset=False) for name, unit in core.modules.items()]
    source = tmp_path / "core.v"
    source.write_text(RAM_VERILOG + convert_unit(core, "core") + "".join(modules))
    assert lint("core", source) == (0, "")


def test_it_needs_lanes() -> None:
    with pytest.raises(ValueError, match="lanes is 0"):
        VectorCore(AcceleratorConfig(lanes=0))
