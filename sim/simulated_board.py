# SPDX-License-Identifier: Apache-2.0
"""The accelerator and its memory in a simulator, as a board for the driver."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from amaranth.hdl import Shape

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.memory.axi import AxiConfig
from speq.sim import board_server, builder, fst, runner
from speq.sim.board_server import ANSWER, REQUEST, TIMEOUT, RequestKind
from speq.sim.builder import SimulationError

#: Top module of the simulation.
TOP = "board"
#: Channels of the memory that can stall.
CHANNELS = ("ar", "r", "aw", "w", "b")
#: Files of the simulation beside the accelerator's Verilog.
SOURCES = tuple(Path(__file__).parent / name for name in ("board.sv", "memory_model.cpp"))

_ARRAY = "*.datapath.engine.array*"
#: The simulator looks after the connection at least this often.
WAIT_CYCLES = 50_000
# Longest wait for an answer, unless SPEQ_TIMEOUT says otherwise. The slowest simulations do some
# hundred cycles a second.
_ANSWER_SECONDS = 600
# Longest wait for the end of a simulator; one that writes waves may have much to write.
_CLOSE_SECONDS = 5
_CLOSE_SECONDS_WAVES = 60


@dataclass(frozen=True)
class MemoryFault:
    """Bytes `first` .. `last` of the address space answer with `response`: 2 SLVERR, 3 DECERR."""

    first: int
    last: int
    response: int


@dataclass(frozen=True)
class Waves:
    """Recording of signals in the cycles `start` .. `stop` - 1.

    Attributes
    ----------
    file : Path
        Written when the board is closed, as FST or as VCD, whichever its name ends in (.fst, .vcd);
        not written if the run ends before `start`.
    start, stop : int
        As `SimulatedBoard.cycles` counts.
    array : bool
        Also the signals in the array and its processing elements, most of all there are.

    Raises
    ------
    ValueError
        If there is no cycle between them, or the file is of another kind.
    """

    file: Path
    start: int
    stop: int
    array: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"waves from cycle {self.start} to {self.stop}; expected a window")
        if self.file.suffix not in (".fst", ".vcd"):
            raise ValueError(f"{self.file}: waves are FST or VCD; name the file .fst or .vcd")

    @property
    def unrecorded(self) -> str | None:
        """Pattern of the instances that are left out."""
        return None if self.array else _ARRAY

    def keep(self, recorded: Path) -> None:
        """Take over what the simulator has recorded, if it came as far."""
        if not recorded.exists():
            return
        if self.file.suffix == ".fst":
            fst.convert(recorded, self.file)
        else:
            shutil.move(recorded, self.file)


@dataclass(frozen=True)
class MemoryOptions:
    """How the memory of a simulated board behaves.

    Attributes
    ----------
    size : int
        Bytes.
    base : int
        Address of the first byte.
    latency : int
        Cycles from a request, or a write's last beat, to the first response, at least 1.
    stalls : dict
        For any of `CHANNELS` the probability, in 256ths, that it stalls in a cycle; with 256 it
        never moves.
    reorder : bool
        Responses of different IDs come in random order, the beats of reads interleaved.
    seed : int
        Of stalls and order.
    faults : sequence of MemoryFault

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    size: int
    base: int = 0
    latency: int = 16
    stalls: Mapping[str, int] | None = None
    reorder: bool = False
    seed: int = 0
    faults: Sequence[MemoryFault] = ()

    def __post_init__(self) -> None:
        if self.size < 1 or self.base < 0 or self.latency < 1:
            raise ValueError(
                f"size, base and latency are {self.size}, {self.base} and {self.latency}; expected "
                "at least 1, 0 and 1"
            )
        for channel, stall in (self.stalls or {}).items():
            if channel not in CHANNELS or not 0 <= stall <= 256:
                raise ValueError(
                    f"stall of channel {channel!r} is {stall!r}; channels are "
                    f"{', '.join(CHANNELS)}, stalls 0 to 256"
                )
        for fault in self.faults:
            if fault.response not in (2, 3) or not 0 <= fault.first <= fault.last:
                raise ValueError(f"{fault} has no bytes or a response other than 2 and 3")

    def plusargs(self, file: str) -> list[str]:
        """Arguments of memory_model.cpp, for contents in `file`."""
        values = {
            "file": file,
            "size": self.size,
            "base": self.base,
            "latency": self.latency,
            "reorder": int(self.reorder),
            "seed": self.seed,
        }
        values |= {f"stall_{name}": stall for name, stall in (self.stalls or {}).items()}
        for i, fault in enumerate(self.faults):
            values[f"fault_{i}"] = f"{fault.first:x},{fault.last:x},{fault.response}"
        return [f"+memory_{name}={value}" for name, value in values.items()]


def parameters(config: AcceleratorConfig) -> dict[str, int]:
    """Parameters of module `board` for a configuration."""

    def id_bits(port: AxiConfig) -> int:
        return Shape.cast(port.read_signature.members["arid"].shape).width

    return {
        "WEIGHTS_BITS": config.weights.data_bits,
        "DATA_BITS": config.data.data_bits,
        "ADDRESS_BITS": config.address_bits,
        "WEIGHTS_ID_BITS": id_bits(config.weights),
        "DATA_ID_BITS": id_bits(config.data),
    }


def simulate_board(
    verilog: str, config: AcceleratorConfig, memory: MemoryOptions, test_module: str
) -> None:
    """Run a cocotb test module on the board of board.sv, in the place of `SimulatedBoard`.

    The test drives clk, rst and, if it likes, s_axi_control_*. Memory is zeros.

    Raises
    ------
    SimulationError
        If the build or a test fails.
    """
    with tempfile.TemporaryFile() as file:
        file.truncate(memory.size)
        runner.simulate(
            verilog,
            TOP,
            test_module,
            sources=SOURCES,
            parameters=parameters(config),
            visible=None,
            plusargs=memory.plusargs(f"/dev/fd/{file.fileno()}"),
            descriptors=(file.fileno(),),
        )


class SimulatedBoard:
    """The accelerator in the simulator, with memory; a `speq.host.board.Board`.

    Simulated time passes only in register accesses (about five cycles each) and in
    `wait_interrupt`; memory is read and written without. It starts after a reset, with zeros in
    memory. A context manager; at its end or with `close` the simulator ends.

    Parameters
    ----------
    verilog : str
        Module speq_top with all that it needs.
    config : AcceleratorConfig
        That the Verilog was made from.
    memory : MemoryOptions
    waves : Waves, optional

    Attributes
    ----------
    before_wait : callable, optional
        Called before `wait_interrupt` lets time pass, and again at least every `WAIT_CYCLES` of it;
        may end the wait by an exception.

    Raises
    ------
    SimulationError
        By the constructor, if the simulation cannot be built; by every other call, if the simulator
        has ended, as it does where the accelerator breaks the rules of AXI4, or if the register
        port does not answer, or the simulator itself for `time_limit`. A note has the end of its
        log.
    ValueError
        If an address, a size or a register's offset or value is out of its range.
    """

    def __init__(
        self,
        verilog: str,
        config: AcceleratorConfig,
        memory: MemoryOptions,
        waves: Waves | None = None,
    ) -> None:
        self.memory = memory
        self.before_wait: Callable[[], None] | None = None
        self._waves = waves
        self._cycles = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._patience = time_limit()
        folder = builder.build(
            verilog,
            TOP,
            sources=SOURCES,
            parameters=parameters(config),
            visible=None,
            waves=waves is not None,
            unrecorded=waves.unrecorded if waves else None,
        )
        self._run = tempfile.TemporaryDirectory(
            prefix=f"{runner.run_folder(folder).name}-", dir=folder
        )
        # Without a name from the start, so that nothing of it is left however this process ends.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._file.truncate(memory.size)
        self._contents = np.memmap(self._file, np.uint8, "r+", shape=(memory.size,))
        self._connection, other_end = socket.socketpair()
        _limit(self._connection, self._patience)
        plusargs = memory.plusargs(f"/dev/fd/{self._file.fileno()}")
        if waves is not None:
            plusargs += [f"+waves_start={waves.start}", f"+waves_stop={waves.stop}"]
        with other_end:
            self._process = runner.start(
                folder,
                TOP,
                board_server.__name__,
                Path(self._run.name),
                environment={board_server.CONNECTION: str(other_end.fileno())},
                plusargs=plusargs,
                descriptors=(self._file.fileno(), other_end.fileno()),
            )

    def __enter__(self) -> SimulatedBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._process is not None:
            self.close()

    def read_register(self, offset: int) -> int:
        """Value of the 32-bit register at byte offset `offset`, a multiple of 4."""
        return self._request(RequestKind.READ, _checked_offset(offset), 0)

    def write_register(self, offset: int, value: int) -> None:
        """Write `value`, 0 to 2**32 - 1, to the register at byte offset `offset`."""
        if not 0 <= value < 2**32:
            raise ValueError(f"value for register {offset:#x} is {value:#x}; it has 32 bits")
        self._request(RequestKind.WRITE, _checked_offset(offset), value)

    def read(self, address: int, size: int) -> np.ndarray:
        """Copy of `size` bytes of memory from `address` on, uint8 [size]."""
        return np.array(self._bytes(address, size))

    def write(self, address: int, values: np.ndarray | bytes | bytearray | memoryview) -> None:
        """Write the bytes of `values`, an array of any type in C order, from `address` on."""
        values = np.ascontiguousarray(
            values if isinstance(values, np.ndarray) else np.frombuffer(values, np.uint8)
        )
        self._bytes(address, values.nbytes)[:] = values.reshape(-1).view(np.uint8)

    def wait_interrupt(self, timeout_cycles: int | None = None) -> bool:
        """Wait until the interrupt line is high, or `timeout_cycles`, at least one; returns whether
        it is."""
        left = timeout_cycles
        while True:
            if self.before_wait is not None:
                self.before_wait()
            cycles = WAIT_CYCLES if left is None else max(1, min(WAIT_CYCLES, left))
            if self._request(RequestKind.WAIT, 0, cycles):
                return True
            if left is not None:
                left -= cycles
                if left <= 0:
                    return False

    def reset(self) -> None:
        """Reset the accelerator and the memory's ports, whatever they are doing; the contents of
        memory stay. Not for a board that records waves."""
        self._request(RequestKind.RESET, 0, 0)

    def cycles(self) -> int:
        """Clock cycles since the reset."""
        return self._cycles

    def close(self) -> None:
        """End the simulator and free the memory; no other call is allowed from then on."""
        process, self._process = self._process, None
        if process is None:
            return
        self._connection.close()
        try:
            process.wait(_CLOSE_SECONDS if self._waves is None else _CLOSE_SECONDS_WAVES)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._waves is not None:
            self._waves.keep(Path(self._run.name) / "waves.vcd")
        del self._contents
        self._file.close()
        self._run.cleanup()

    def _bytes(self, address: int, size: int) -> np.ndarray:
        first = address - self.memory.base
        if first < 0 or size < 0 or first + size > self.memory.size:
            raise ValueError(
                f"{size} bytes at {address:#x} are not in the memory of {self.memory.size} bytes "
                f"at {self.memory.base:#x}"
            )
        return self._contents[first : first + size]

    def _request(self, kind: RequestKind, address: int, value: int) -> int:
        if self._process is None:
            raise SimulationError("the simulated board has been closed")
        try:
            self._connection.sendall(REQUEST.pack(kind, address, value))
            message = self._connection.recv(ANSWER.size, socket.MSG_WAITALL)
        except ConnectionError:
            message = b""
        except BlockingIOError as error:
            self._process.kill()
            raise SimulationError(
                f"the simulator has not answered for {self._patience} s, and was ended: the "
                "environment variable SPEQ_TIMEOUT sets another limit"
            ) from error
        if len(message) < ANSWER.size:
            raise self._failure(self._process)
        answer, response, self._cycles = ANSWER.unpack(message)
        if response:
            what = "no answer" if response == TIMEOUT else f"response {response}"
            raise SimulationError(f"{what} to a {kind.name.lower()} of register {address:#x}")
        return answer

    def _failure(self, process: subprocess.Popen[bytes]) -> SimulationError:
        """Why the simulator ended, and the end of its log."""
        process.wait()
        log = Path(self._run.name) / "test.log"
        lines = log.read_text().splitlines()
        reasons = [line for line in lines if line.startswith("memory: ")]
        reason = reasons[0] if reasons else f"exit code {process.returncode}"
        error = SimulationError(f"the simulator ended: {reason}")
        error.add_note("\n".join(lines[-40:]))
        return error


def time_limit() -> int:
    """Seconds in which a simulator has to answer: the environment variable SPEQ_TIMEOUT, 600 by
    default. Raises ValueError if it is no whole number from 1 to 999999."""
    text = os.environ.get("SPEQ_TIMEOUT", str(_ANSWER_SECONDS))
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or int(text) == 0:
        raise ValueError(f"SPEQ_TIMEOUT is {text!r:.40}; expected seconds, 1 to 999999")
    return int(text)


def _limit(connection: socket.socket, seconds: int) -> None:
    """Let the connection wait for so long at most; without this it waits as well, but for ever."""
    limit = struct.pack("ll", seconds, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _checked_offset(offset: int) -> int:
    if offset % 4 or not 0 <= offset < 4096:
        raise ValueError(f"register offset {offset:#x} is not a multiple of 4 below 4096")
    return offset
