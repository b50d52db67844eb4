# SPDX-License-Identifier: Apache-2.0
"""The simulated board, with a copy machine in the accelerator's place."""

import multiprocessing
import os
import select
import shutil
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig, Fault
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.memory_writer import MemoryWriter
from speq.hw.verilog import convert_unit
from speq.sim import fst, runner, simulated_board
from speq.sim.builder import SimulationError
from speq.sim.simulated_board import (
    CHANNELS,
    MemoryFault,
    MemoryOptions,
    SimulatedBoard,
    Waves,
    simulate_board,
)

SYSTEM = AcceleratorConfig(
    engine=EngineConfig(rows=2, cols=8),
    weights=AxiConfig(data_bits=128),
    data=AxiConfig(data_bits=128),
)
BEAT = SYSTEM.data.beat_bytes
SIZE = 1 << 16
BASE = 0x4_0000_0000

# Registers of the copy machine. Writing START copies BEATS beats from SOURCE to TARGET, both
# offsets from BASE, through the weights port (1) or the data port (0). STATUS has the fault and
# whether it is busy; the interrupt is its complement, enabled by ENABLE.
START, SOURCE, TARGET, BEATS, STATUS, ENABLE, CYCLES, MISCHIEF, SILENT = range(0, 36, 4)


def _flat(prefix: str, signature: wiring.Signature) -> dict[str, wiring.Member]:
    return {f"{prefix}_{name}": member for name, member in signature.members.items()}


def _control_members() -> dict[str, wiring.Member]:
    inputs = {"awaddr": 12, "awprot": 3, "awvalid": 1, "wdata": 32, "wstrb": 4, "wvalid": 1}
    inputs |= {"bready": 1, "araddr": 12, "arprot": 3, "arvalid": 1, "rready": 1}
    outputs = {"awready": 1, "wready": 1, "bresp": 2, "bvalid": 1, "arready": 1, "rdata": 32}
    outputs |= {"rresp": 2, "rvalid": 1}
    return {f"s_axi_control_{name}": In(bits) for name, bits in inputs.items()} | {
        f"s_axi_control_{name}": Out(bits) for name, bits in outputs.items()
    }


class CopyMachine(wiring.Component):
    """Copies memory with readers and a writer. MISCHIEF breaks a rule of AXI4, see `_spoil`."""

    def __init__(self) -> None:
        super().__init__(
            {"irq": Out(1)}
            | _control_members()
            | _flat("m_axi_weights", SYSTEM.weights.read_signature)
            | _flat("m_axi_data", SYSTEM.data.read_signature)
            | _flat("m_axi_data", SYSTEM.data.write_signature)
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.weights = weights = MemoryReader(SYSTEM.weights)
        m.submodules.reader = reader = MemoryReader(SYSTEM.data)
        m.submodules.writer = writer = MemoryWriter(SYSTEM.data)
        units = (weights, reader, writer)
        self.mischief = Signal(3)
        self._join(m, "m_axi_weights", weights.axi)
        self._join(m, "m_axi_data", reader.axi)
        self._join(m, "m_axi_data", writer.axi)
        self._spoil(m)

        values = {name: Signal(32, name=name) for name in ("source", "target", "beats", "cycles")}
        start, through_weights, enable = Signal(), Signal(), Signal()
        busy = Signal()
        for unit in units:
            m.d.comb += [unit.base.eq(0), unit.limit.eq(-1), unit.clear.eq(0)]
        for unit_name, unit, address, chosen in (
            ("weights", weights, "source", through_weights),
            ("reader", reader, "source", ~through_weights),
            ("writer", writer, "target", 1),
        ):
            sent = Signal(name=f"{unit_name}_sent", init=1)
            m.d.comb += [
                unit.command.payload.address.eq(values[address] + BASE),
                unit.command.payload.beats.eq(values["beats"]),
                unit.command.valid.eq(~sent),
            ]
            with m.If(start):
                m.d.sync += sent.eq(~chosen)
            with m.Elif(unit.command.ready):
                m.d.sync += sent.eq(1)
        m.d.comb += [
            writer.data.payload.strobe.eq(-1),
            writer.data.valid.eq(weights.data.valid | reader.data.valid),
            weights.data.ready.eq(writer.data.ready),
            reader.data.ready.eq(writer.data.ready),
            writer.data.payload.data.eq(
                Mux(weights.data.valid, weights.data.payload, reader.data.payload)
            ),
        ]
        with m.If(start):
            m.d.sync += [busy.eq(1), values["cycles"].eq(0)]
        with m.Elif(busy):
            m.d.sync += values["cycles"].eq(values["cycles"] + 1)
        faults = [unit.error != Fault.NONE for unit in units]
        with m.If(writer.done | Cat(*faults).any()):
            m.d.sync += busy.eq(0)
        m.d.comb += self.irq.eq(~busy & enable)
        status = Cat(busy, weights.error, reader.error, writer.error)
        self._registers(m, values, status, start, through_weights, enable)
        return m

    def _join(self, m: Module, prefix: str, axi: wiring.Signature) -> None:
        for name, member in axi.signature.members.items():
            port = getattr(self, f"{prefix}_{name}")
            inner = getattr(axi, name)
            m.d.comb += port.eq(inner) if member.flow is Out else inner.eq(port)

    def _spoil(self, m: Module) -> None:
        """1: bursts of another type, 2: of another beat size, 3: past a page, 4: wlast too early,
        5: a changing offer; 6 breaks no rule, but gives every other burst of 16 beats the ID 1."""
        with m.Switch(self.mischief):
            with m.Case(1):
                m.d.comb += self.m_axi_weights_arburst.eq(0)
            with m.Case(2):
                m.d.comb += self.m_axi_data_awsize.eq(2)
            with m.Case(3):
                m.d.comb += self.m_axi_weights_arlen.eq(255)
            with m.Case(4):
                m.d.comb += self.m_axi_data_wlast.eq(1)
            with m.Case(5):
                flip = Signal()
                m.d.sync += flip.eq(~flip)
                m.d.comb += self.m_axi_weights_arid.eq(flip)
            with m.Case(6):
                m.d.comb += self.m_axi_weights_arid.eq(self.m_axi_weights_araddr[8])

    def _registers(
        self,
        m: Module,
        values: dict[str, Signal],
        status: object,
        start: Signal,
        through_weights: Signal,
        enable: Signal,
    ) -> None:
        """Writes are taken when both address and data are there, reads in one cycle."""
        s = {
            name.removeprefix("s_axi_control_"): getattr(self, name) for name in _control_members()
        }
        write = s["awvalid"] & s["wvalid"] & ~s["bvalid"]
        m.d.comb += [s["awready"].eq(write), s["wready"].eq(write)]
        m.d.sync += start.eq(0)
        with m.If(s["bready"]):
            m.d.sync += s["bvalid"].eq(0)
        with m.If(write):
            m.d.sync += s["bvalid"].eq(1)
            with m.Switch(s["awaddr"]):
                for offset, target in (
                    (START, Cat(through_weights)),
                    (SOURCE, values["source"]),
                    (TARGET, values["target"]),
                    (BEATS, values["beats"]),
                    (ENABLE, enable),
                    (MISCHIEF, self.mischief),
                ):
                    with m.Case(offset):
                        m.d.sync += target.eq(s["wdata"])
            m.d.sync += start.eq(s["awaddr"] == START)
        read = s["arvalid"] & ~s["rvalid"] & (s["araddr"] != SILENT)
        m.d.comb += s["arready"].eq(read)
        with m.If(s["rready"]):
            m.d.sync += s["rvalid"].eq(0)
        with m.If(read):
            m.d.sync += s["rvalid"].eq(1)
            with m.Switch(s["araddr"]):
                for offset, source in (
                    (SOURCE, values["source"]),
                    (TARGET, values["target"]),
                    (STATUS, status),
                    (CYCLES, values["cycles"]),
                ):
                    with m.Case(offset):
                        m.d.sync += s["rdata"].eq(source)


@pytest.fixture(scope="module")
def verilog() -> str:
    return convert_unit(CopyMachine(), "speq_top") + RAM_VERILOG


def _options(**options) -> MemoryOptions:
    return MemoryOptions(size=SIZE, base=BASE, seed=runner.seed(), **options)


def _start(board: SimulatedBoard, source: int, target: int, beats: int, port: int) -> None:
    board.write_register(SOURCE, source)
    board.write_register(TARGET, target)
    board.write_register(BEATS, beats)
    board.write_register(ENABLE, 1)
    board.write_register(START, port)


def _copy(board: SimulatedBoard, source: int, target: int, beats: int, port: int = 0) -> int:
    """Copies, and returns STATUS."""
    _start(board, source, target, beats, port)
    assert board.wait_interrupt(50_000)
    return board.read_register(STATUS)


def _random_bytes(size: int) -> np.ndarray:
    return np.random.default_rng(runner.seed()).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize(
    "options",
    [{}, {"latency": 1}, {"latency": 60, "stalls": dict.fromkeys(CHANNELS, 100), "reorder": True}],
)
def test_copies(verilog: str, options: dict) -> None:
    contents = _random_bytes(SIZE)
    transfers = [(0, 0x8000, 1), (0xFF0, 0x9010, 300), (0x2000, 0xF000, 256), (0x9010, 0, 40)]
    with SimulatedBoard(verilog, SYSTEM, _options(**options)) as board:
        assert not board.read(BASE, SIZE).any()
        board.write(BASE, contents)
        for number, (source, target, beats) in enumerate(transfers):
            assert _copy(board, source, target, beats, number % 2) == 0
            size = beats * BEAT
            contents[target : target + size] = contents[source : source + size]
        np.testing.assert_array_equal(board.read(BASE, SIZE), contents)


def test_an_ideal_memory_moves_a_beat_per_cycle(verilog: str) -> None:
    beats = 2000
    with SimulatedBoard(verilog, SYSTEM, _options()) as board:
        for port in (0, 1):
            assert _copy(board, 0, 0x8000, beats, port) == 0
            assert beats <= board.read_register(CYCLES) <= beats + 100


def test_latency_counts_from_request_to_response(verilog: str) -> None:
    cycles = {}
    for latency in (1, 2, 50):
        with SimulatedBoard(verilog, SYSTEM, _options(latency=latency)) as board:
            assert _copy(board, 0, 0x8000, 1) == 0
            cycles[latency] = board.read_register(CYCLES)
    # Once for the read and once for the write.
    assert cycles[2] - cycles[1] == 2
    assert cycles[50] - cycles[1] == 98


def test_stalls_are_those_of_the_seed(verilog: str) -> None:
    def cycles(channel: str, seed: int) -> int:
        memory = MemoryOptions(size=SIZE, base=BASE, seed=seed, stalls={channel: 128})
        with SimulatedBoard(verilog, SYSTEM, memory) as board:
            assert _copy(board, 0, 0x8000, 500) == 0
            return board.read_register(CYCLES)

    first = cycles("r", 1)
    assert first == cycles("r", 1) != cycles("r", 2)
    assert first > 800
    assert cycles("w", 1) > 800


def test_responses_of_different_ids_are_reordered(verilog: str) -> None:
    beats = 512
    numbers = np.arange(beats * BEAT // 4, dtype=np.uint32)
    second_id = numbers // (256 // 4) % 2 == 1
    for reorder in (False, True):
        with SimulatedBoard(verilog, SYSTEM, _options(reorder=reorder)) as board:
            board.write(BASE, numbers)
            board.write_register(MISCHIEF, 6)
            assert _copy(board, 0, 0x8000, beats, 1) == 0
            copied = board.read(BASE + 0x8000, beats * BEAT).view(np.uint32)
        if reorder:
            assert (copied != numbers).any()
            of_second_id = second_id[copied]
            np.testing.assert_array_equal(copied[of_second_id], numbers[second_id])
            np.testing.assert_array_equal(copied[~of_second_id], numbers[~second_id])
        else:
            np.testing.assert_array_equal(copied, numbers)


def test_faults(verilog: str) -> None:
    faults = (
        MemoryFault(BASE + 0x1008, BASE + 0x1008, 2),
        MemoryFault(BASE + 0x9000, BASE + 0x903F, 3),
        MemoryFault(BASE + SIZE, 2**40 - 1, 3),
    )
    with SimulatedBoard(verilog, SYSTEM, _options(faults=faults)) as board:
        assert _copy(board, 0xF00, 0x8000, 16) == 0
    for source, target, port, status in (
        (0xF80, 0x8000, 0, Fault.SLAVE.value << 3),
        (0xF80, 0x8000, 1, Fault.SLAVE.value << 1),
        (0, 0x8F80, 0, Fault.DECODE.value << 5),
        (SIZE + 0x100000, 0x8000, 0, Fault.DECODE.value << 3),
    ):
        with SimulatedBoard(verilog, SYSTEM, _options(faults=faults)) as board:
            board.write(BASE, contents := _random_bytes(SIZE))
            assert _copy(board, source, target, 32, port) == status
            faulty = slice(0x9000, 0x9040)
            np.testing.assert_array_equal(board.read(BASE, SIZE)[faulty], contents[faulty])


@pytest.mark.parametrize(
    ("mischief", "source", "stalls", "message"),
    [
        (1, 0, {}, "weights, cycle .*: ar 0x400000000, 16 beats: burst type is 0, expected INCR"),
        (2, 0, {}, "data, cycle .*: aw 0x400008000, 16 beats: beats of 4 bytes, expected 16"),
        (3, 0x100, {}, "ar 0x400000100, 256 beats: the burst crosses a multiple of 4 KiB"),
        (4, 0, {}, "w: wlast is 1 in beat 0 of the burst of 16 beats at 0x400008000"),
        (5, 0, {"ar": 240}, "weights, cycle .*: ar: an offer changed or was withdrawn"),
        (0, SIZE, {}, "ar 0x400010000, 16 beats: the burst leaves the memory"),
    ],
)
def test_broken_rules_end_the_simulation(
    verilog: str, mischief: int, source: int, stalls: dict, message: str
) -> None:
    with SimulatedBoard(verilog, SYSTEM, _options(stalls=stalls)) as board:
        board.write_register(MISCHIEF, mischief)
        with pytest.raises(SimulationError, match=message):
            _start(board, source, 0x8000, 32, 1)
            board.wait_interrupt(1000)


def test_time_passes_only_in_accesses(verilog: str) -> None:
    with SimulatedBoard(verilog, SYSTEM, _options()) as board:
        board.write_register(SOURCE, 0xFFFFFFFF)
        before = board.cycles()
        board.write(BASE, np.arange(100, dtype=np.float32))
        np.testing.assert_array_equal(board.read(BASE + 4, 4).view(np.float32), [1])
        assert board.cycles() == before
        assert board.read_register(SOURCE) == 0xFFFFFFFF
        assert before < board.cycles() <= before + 8
        before = board.cycles()
        assert not board.wait_interrupt(0)
        assert before < board.cycles() <= before + 8
        before = board.cycles()
        assert not board.wait_interrupt(120_000)
        assert before + 120_000 <= board.cycles() <= before + 120_020


def test_a_silent_register_port(verilog: str) -> None:
    with SimulatedBoard(verilog, SYSTEM, _options()) as board:
        with pytest.raises(SimulationError, match="no answer to a read of register 0x20"):
            board.read_register(SILENT)


def test_a_simulator_that_dies(verilog: str) -> None:
    with SimulatedBoard(verilog, SYSTEM, _options()) as board:
        board.read_register(SOURCE)
        folder = Path(board._run.name)
        assert folder.exists()
        os.kill(board._process.pid, signal.SIGKILL)
        with pytest.raises(SimulationError, match="the simulator ended: exit code -9") as caught:
            board.read_register(SOURCE)
        assert "speq.sim.board_server.serve" in caught.value.__notes__[0]
    assert not folder.exists()


def test_the_simulator_does_not_outlive_its_board(verilog: str) -> None:
    def leave(connection: Connection) -> None:
        board = SimulatedBoard(verilog, SYSTEM, _options())
        board.read_register(SOURCE)
        connection.send((board._process.pid, board._run.name))
        os.kill(os.getpid(), signal.SIGKILL)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=leave, args=(theirs,))
    process.start()
    simulator, folder = ours.recv()
    try:
        watched = os.pidfd_open(simulator)
    except ProcessLookupError:
        pass
    else:
        assert select.select([watched], [], [], 60)[0]
        os.close(watched)
    process.join()
    shutil.rmtree(folder)


def test_close_ends_the_simulator(verilog: str) -> None:
    board = SimulatedBoard(verilog, SYSTEM, _options())
    board.read_register(SOURCE)
    process, folder = board._process, Path(board._run.name)
    board.close()
    assert process.returncode == 0
    assert not folder.exists()
    board.close()
    with pytest.raises(SimulationError, match="closed"):
        board.read_register(SOURCE)


@pytest.mark.parametrize("name", ["waves.vcd", "waves.fst"])
def test_waves_of_a_window(verilog: str, tmp_path: Path, name: str) -> None:
    waves = Waves(tmp_path / name, 100, 300)
    with SimulatedBoard(verilog, SYSTEM, _options(), waves) as board:
        assert _copy(board, 0, 0x8000, 500) == 0
    cycle = 2000  # ps
    if name.endswith(".fst"):
        first, last, signals = fst.contents(waves.file)
        assert "board.accelerator.reader.splitter.clk" in signals
        assert signals["board.m_axi_data_araddr[39:0]"] == 40
        assert 199 * cycle <= last - first <= 201 * cycle
        return
    text = waves.file.read_text()
    assert "m_axi_data_araddr" in text and "splitter" in text
    times = [int(line[1:]) for line in text.splitlines() if line.startswith("#")]
    assert times == sorted(times)
    assert 199 * cycle <= times[-1] - times[0] <= 201 * cycle


def test_waves_of_a_run_that_is_too_short(verilog: str, tmp_path: Path) -> None:
    waves = Waves(tmp_path / "waves.fst", 1 << 40, 1 << 41)
    with SimulatedBoard(verilog, SYSTEM, _options(), waves) as board:
        assert _copy(board, 0, 0x8000, 5) == 0
    assert not waves.file.exists()


def test_impossible_arguments(verilog: str) -> None:
    with pytest.raises(ValueError, match="latency"):
        MemoryOptions(size=SIZE, latency=0)
    with pytest.raises(ValueError, match="stall of channel 'x'"):
        MemoryOptions(size=SIZE, stalls={"x": 3})
    with pytest.raises(ValueError, match="response"):
        MemoryOptions(size=SIZE, faults=[MemoryFault(0, 1, 1)])
    with pytest.raises(ValueError, match="expected a window"):
        Waves(Path("waves.fst"), 5, 5)
    with pytest.raises(ValueError, match="name the file"):
        Waves(Path("waves.txt"), 5, 6)
    with SimulatedBoard(verilog, SYSTEM, _options()) as board:
        with pytest.raises(ValueError, match="2 bytes at 0x40000ffff"):
            board.read(BASE + SIZE - 1, 2)
        with pytest.raises(ValueError, match="not in the memory"):
            board.write(BASE - 1, b"x")
        with pytest.raises(ValueError, match="register offset 0x2 "):
            board.read_register(2)
        with pytest.raises(ValueError, match="32 bits"):
            board.write_register(0, -1)


def test_another_master_of_the_registers(verilog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    simulate_board(verilog, SYSTEM, _options(), "board_registers")
    with pytest.raises(SimulationError, match=r"0 tests|exit code"):
        simulate_board(verilog, SYSTEM, _options(), "no_such_module")


def test_a_design_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="building") as caught:
        SimulatedBoard("module other; endmodule", SYSTEM, _options())
    assert "speq_top" in caught.value.__notes__[0]


def test_a_simulator_that_never_answers(verilog: str) -> None:
    with SimulatedBoard(verilog, SYSTEM, _options()) as board:
        assert board.read_register(STATUS) == board.read_register(STATUS)
        # Only now, as the start may take longer on a busy machine.
        simulated_board._limit(board._connection, 1)
        os.kill(board._process.pid, signal.SIGSTOP)
        with pytest.raises(SimulationError, match=r"has not answered.*SPEQ_TIMEOUT sets another"):
            board.read_register(STATUS)
        with pytest.raises(SimulationError, match="the simulator ended"):
            board.read_register(STATUS)


def test_limit_of_time(verilog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert simulated_board.time_limit() == 600
    monkeypatch.setenv("SPEQ_TIMEOUT", "7")
    assert simulated_board.time_limit() == 7
    for wrong in ("", "0", "-1", "1.5", "x", "1" * 5000):
        monkeypatch.setenv("SPEQ_TIMEOUT", wrong)
        with pytest.raises(ValueError, match=r"SPEQ_TIMEOUT is .*; expected seconds"):
            SimulatedBoard(verilog, SYSTEM, _options())
