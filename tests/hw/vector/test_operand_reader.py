# SPDX-License-Identifier: Apache-2.0
"""The reader of the vector unit's operands."""

from __future__ import annotations

from speq.sim.benches import operand_reader


def test_operand_reader() -> None:
    operand_reader.run()
