# SPDX-License-Identifier: Apache-2.0
"""The memory primitive for Amaranth's simulator, which cannot simulate Verilog modules."""

from __future__ import annotations

import pytest
from amaranth.hdl import Elaboratable, Module
from amaranth.lib.memory import Memory

from speq.hw.common.ram import Ram


def _elaborate(self: Ram, platform: object) -> Elaboratable:
    """What the Verilog of `Ram` does: a read of the address being written gives the old value.

    Words that have not been written, which are undefined in Verilog, are all ones.
    """
    m = Module()
    ones = [2**self.width - 1] * self.depth
    m.submodules.memory = memory = Memory(shape=self.width, depth=self.depth, init=ones)
    write, read = memory.write_port(), memory.read_port()
    m.d.comb += [
        write.en.eq(self.write_enable),
        write.addr.eq(self.write_address),
        write.data.eq(self.write_data),
        read.en.eq(self.read_enable),
        read.addr.eq(self.read_address),
        self.read_data.eq(read.data),
    ]
    return m


@pytest.fixture
def simulable_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let units with a `Ram` inside run in Amaranth's simulator."""
    monkeypatch.setattr(Ram, "elaborate", _elaborate)
