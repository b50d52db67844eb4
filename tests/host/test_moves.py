# SPDX-License-Identifier: Apache-2.0
"""Runs that move the KV entries of accepted rows by themselves, on the functional model."""

from __future__ import annotations

import numpy as np

from speq.host.accelerator_model import AcceleratorModel
from speq.host.registers import Registers
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.descriptor import Descriptor, DescriptorKind
from speq.hw.engine_config import EngineConfig
from speq.sim.runner import seed
from tests.sim.workloads import BASE, SIZE, Workload, moving, run

SEED = seed()
CONFIG = AcceleratorConfig(EngineConfig(rows=8, cols=8, max_k=256), lanes=4)
COLS = CONFIG.engine.cols


def entries_of(board: AcceleratorModel, move: Descriptor) -> np.ndarray:
    """All keys and values of the block by entry, uint16 [entries, elements]."""
    entries = move.outer // (2 * COLS)
    keys = board.read(move.first, entries // COLS * move.inner).view("<u2")
    keys = keys.reshape(entries // COLS, -1, COLS).transpose(0, 2, 1)
    values = board.read(move.second, move.o * -(-move.k // COLS) * move.outer).view("<u2")
    values = values.reshape(-1, entries, COLS).transpose(1, 0, 2)
    parts = [part.reshape(entries, -1) for part in (keys, values)]
    return np.concatenate(parts, axis=1)


def accepted_rows(registers: Registers) -> list[int]:
    """The rows on the path to that of the last token."""
    rows = [registers.fields("STEP")["last_row"]]
    while rows[-1]:
        rows.append(registers.fields("ROW_PLACE", rows[-1])["parent"])
    return rows[::-1]


def test_entries_of_accepted_rows_are_moved() -> None:
    random = np.random.default_rng(SEED)
    moved = 0
    for _ in range(30):
        board = AcceleratorModel(CONFIG, SIZE, BASE)
        registers = Registers(board, CONFIG)
        workload, move = moving(CONFIG, random)
        verify = workload.descriptors[-4]
        assert verify.kind is DescriptorKind.ARGMAX
        waits = run(board, workload)
        before = None
        for status in waits:
            if before is None:  # the content is in memory from here on
                before = entries_of_content(workload, move)
            if status.state == "IDLE":
                break
            assert status.state == "STEP"
            start = registers["PASS_POSITION"]
            assert registers.fields("PASS")["kind"] == PassKind.VERIFY.value
            expected = before.copy()
            for depth, row in enumerate(accepted_rows(registers)):
                expected[start + depth] = expected[start + row]
                moved += row != depth
            assert registers["POSITION"] == start + registers.fields("STEP")["committed"]
            assert np.array_equal(entries_of(board, move), expected), f"SPEQ_SEED={SEED}"
            before = expected
            size = verify.k * CONFIG.activation_bytes // 2
            board.write(verify.activations, random.standard_normal(size).astype(np.float16))
    assert moved > 10, "the trials prove too little"


def entries_of_content(workload: Workload, move: Descriptor) -> np.ndarray:
    """`entries_of` before the run."""
    board = AcceleratorModel(CONFIG, SIZE, BASE)
    board.write(BASE, workload.content)
    return entries_of(board, move)


def test_a_move_that_fails_commits_nothing() -> None:
    """The step that it belongs to is as if it had not been."""
    random = np.random.default_rng(SEED)
    failed = 0
    for _ in range(60):
        board = AcceleratorModel(CONFIG, SIZE, BASE)
        registers = Registers(board, CONFIG)
        workload, move = moving(CONFIG, random)
        index = len(workload.descriptors) - 2
        workload.descriptors[index] = Descriptor(**vars(move) | {"k": 0})
        workload.write_program()
        position, root, committed = workload.position, workload.registers["ROOT"], 0
        for status in run(board, workload):
            if status.state == "STEP":
                position, root = registers["POSITION"], registers["ROOT"]
                committed = registers["COMMITTED"]
            elif status.error is ErrorCode.BAD_SIZE:
                failed += 1
                assert status.address == workload.registers["MOVE_PROGRAM"]
                assert (registers["POSITION"], registers["ROOT"]) == (position, root)
                assert registers["COMMITTED"] == registers["RING_INDEX"] == committed
    assert failed > 5, "the trials prove too little"


def test_without_move_entries_stay() -> None:
    random = np.random.default_rng(SEED)
    board = AcceleratorModel(CONFIG, SIZE, BASE)
    for _ in range(10):
        workload, move = moving(CONFIG, random)
        workload.registers |= {"RUN": 9, "MOVE_PROGRAM": 1}  # which is not looked at
        *_, last = run(board, workload)
        assert last.state == "IDLE"
        assert np.array_equal(entries_of(board, move), entries_of_content(workload, move))
    workload, _ = moving(CONFIG, random)
    workload.registers |= {"MOVE_PROGRAM": 1}
    *_, last = run(board, workload)
    assert last.error is ErrorCode.BAD_REGISTER
