# SPDX-License-Identifier: Apache-2.0
"""The mover of KV entries against a model of memory, and its Verilog."""

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.vector.entry_mover import EntryMover
from speq.sim.benches import entry_mover
from tests.hw.verilog_tools import lint, write_unit


def test_entry_mover() -> None:
    entry_mover.run()


def test_verilator_lints_it_without_a_warning(tmp_path) -> None:
    name = "speq_entry_mover"
    source = write_unit(EntryMover(AcceleratorConfig(lanes=4)), name, tmp_path)
    assert lint(name, source) == (0, "")
