# SPDX-License-Identifier: Apache-2.0
"""The testbench's program: the results that plain Python computes are the golden model's."""

from __future__ import annotations

import pytest

from speq.host.accelerator_model import AcceleratorModel
from speq.host.registers import Registers
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.control.register_map import ANSWERS, STATES
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog.smoke_program import HOST_ARGUMENT, SmokeProgram, smoke_program
from speq.model.number_format import FormatConfig


def _ports(weights_bits: int, data_bits: int, address_bits: int) -> dict[str, AxiConfig]:
    ports = {"weights": weights_bits, "data": data_bits}
    return {name: AxiConfig(bits, address_bits) for name, bits in ports.items()}


CONFIGS = {
    "default": AcceleratorConfig(),
    "smallest": AcceleratorConfig(
        EngineConfig(rows=1, cols=4, max_k=1, max_o=1), **_ports(64, 64, 16)
    ),
    "largest": AcceleratorConfig(
        EngineConfig(rows=64, cols=256, draft_rows=64, max_k=2**16, max_o=2**24),
        **_ports(1024, 1024, 16),
    ),
    "6 inputs, 5 outputs": AcceleratorConfig(
        EngineConfig(rows=3, cols=8, draft_rows=2, max_k=6, max_o=5), **_ports(64, 128, 64)
    ),
    "split 0": AcceleratorConfig(EngineConfig(rows=2, cols=4, format=FormatConfig(32, 0))),
    "split 3": AcceleratorConfig(EngineConfig(rows=2, cols=4, format=FormatConfig(128, 3))),
}

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def board_with(program: SmokeProgram, config: AcceleratorConfig) -> AcceleratorModel:
    """The functional model with the program in its memory, waiting for the host."""
    start = program.weights.start
    board = AcceleratorModel(config, program.written.stop - start, start)
    for region in (program.weights, program.operands):
        for buffer in region.buffers:
            board.write(buffer.address, buffer.content)
    registers = Registers(board, config)
    for name, value in program.registers.items():
        registers[name] = value
    registers.command("start")
    return board


@each_config
def test_results_are_those_of_the_golden_model(config: AcceleratorConfig) -> None:
    program = smoke_program(config)
    board = board_with(program, config)
    registers = Registers(board, config)
    assert registers["STATUS"] == STATES["HOST"][0], ErrorCode(registers["ERROR"])
    assert registers["HOST_ARGUMENT"] == HOST_ARGUMENT
    for product in program.results:
        for token, row in enumerate(product.rows):
            got = board.read(product.address + token * product.stride, len(row)).tobytes()
            assert got.hex() == row.hex(), (product.name, token)
    registers["HOST_ANSWER"] = ANSWERS["CONTINUE"][0]
    assert registers["STATUS"] == STATES["IDLE"][0]
    assert registers["DESCRIPTORS"] == program.descriptors


@each_config
def test_buffers_are_in_order_and_whole_beats(config: AcceleratorConfig) -> None:
    program = smoke_program(config)
    end = 1 << config.address_bits - 1
    for region in (program.weights, program.operands, program.written):
        assert region.start >= end, "regions overlap"
        end = region.start
        for buffer in region.buffers:
            assert buffer.address >= end and buffer.address % config.alignment == 0, buffer.name
            assert len(buffer.content) % region.beat == 0, buffer.name
            end = buffer.address + len(buffer.content)
    assert end <= 1 << config.address_bits


def test_results_are_many_and_different() -> None:
    """And the modes give different ones, so that none stands in for another."""
    verify, draft, bypass = smoke_program(AcceleratorConfig()).results
    assert [len(product.rows) for product in (verify, draft, bypass)] == [2, 1, 2]
    words = [row[i : i + 4] for row in (*verify.rows, *draft.rows) for i in range(0, len(row), 4)]
    assert len(words) == 3 * 16 and len(set(words)) == len(words)
