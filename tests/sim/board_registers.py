# SPDX-License-Identifier: Apache-2.0
"""A cocotb test of the copy machine in test_board.py, with cocotbext-axi at its registers."""

import logging

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles
from cocotbext.axi import AxiLiteBus, AxiLiteMaster, AxiResp

SOURCE, TARGET = 4, 8


@cocotb.test()
async def registers_keep_their_values(dut) -> None:
    logging.getLogger(f"cocotb.{dut._name}").setLevel(logging.WARNING)
    dut.rst.value = 1
    dut.request.value = 0
    cocotb.start_soon(Clock(dut.clk, 2, "ns").start())
    await ClockCycles(dut.clk, 4)
    master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi_control"), dut.clk, dut.rst)
    dut.rst.value = 0
    values = {SOURCE: 0x12345678, TARGET: 0x9ABCDEF0}
    for offset, value in values.items():
        answer = await master.write(offset, value.to_bytes(4, "little"))
        assert answer.resp == AxiResp.OKAY
    for offset, value in values.items():
        answer = await master.read(offset, 4)
        assert int.from_bytes(answer.data, "little") == value
        assert answer.resp == AxiResp.OKAY
