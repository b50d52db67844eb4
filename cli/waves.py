# SPDX-License-Identifier: Apache-2.0
"""`speq waves`: the accelerator's signals while it decodes, recorded for GTKWave.

The RTL runs in the simulator as with `speq generate --backend rtl`. A window of its cycles is
recorded as FST, and beside it goes a GTKWave save file that shows the signals which tell what the
accelerator is doing, in groups and with names for states and kinds.

A window may begin at an event. A first run then finds its cycle: the simulation stands still while
the host works, so that a second run meets the same events in the same cycles.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from amaranth.hdl import Elaboratable, Fragment, Signal
from rich.console import Console
from vcd.gtkw import GTKWSave, make_translation_filter

from speq.cli.generate import DEFAULT_THRESHOLD, encode_model, system_for
from speq.host.driver import Host
from speq.host.layout import MemoryLayout, host_argument
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.descriptor import DescriptorKind
from speq.hw.control.program_walker import ProgramWalker
from speq.hw.control.register_map import STATES, registers
from speq.hw.control.speculation_controller import SpeculationController
from speq.hw.engine_config import Mode
from speq.hw.verilog import generate_top
from speq.model.checkpoint import Model
from speq.model.format import EncodedTensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings
from speq.sim import fst
from speq.sim.board_server import CLOCK_NS
from speq.sim.simulated_board import MemoryOptions, SimulatedBoard, Waves

#: Passes and what follows them, by the names of --at.
EVENTS = {
    "prompt": PassKind.SINGLE,
    "draft": PassKind.DRAFT,
    "verify": PassKind.VERIFY,
    "step": None,
}
#: Cycles of the window before the interrupt that tells the host of the event: a pass is under way
#: for about half of them.
BEFORE = 100

_STEM = "speq"
_NEVER = 1 << 62
_CLOCK_PS = CLOCK_NS * 1000  # in which FST counts
# GTKWave's zoom is minus the log2 of the time in a frame; its window is about so many of them wide.
_FRAMES = 6
_RANGE = re.compile(r"\[\d+:\d+\]$")  # of a vector's bits, behind its name


@dataclass(frozen=True)
class Request:
    """The options of the command; `speq waves --help` explains them."""

    model: str
    prompt: str
    output: Path
    rows: int
    cols: int
    draft_length: int | None
    max_tokens: int
    start: int | None
    at: str | None
    nth: int
    cycles: int
    array: bool


class _Reached(Exception):
    """The run has come as far as it has to."""


class _Watch:
    """A board that notes the cycles of events and ends the run where it need not go on.

    Parameters
    ----------
    board : SimulatedBoard
    config : AcceleratorConfig
    enough : function of the watch
        Whether the run shall end; asked at every interrupt.
    """

    def __init__(
        self, board: SimulatedBoard, config: AcceleratorConfig, enough: Callable[[_Watch], bool]
    ) -> None:
        self._board, self._enough = board, enough
        offsets = {register.name: register.offset for register in registers(config)}
        self._argument, self._step = offsets["HOST_ARGUMENT"], offsets["STEP"]
        self._interrupt = 0  # cycle of the last one
        #: Cycles of the interrupts that told of each event.
        self.events: dict[str, list[int]] = {name: [] for name in EVENTS}

    def read_register(self, offset: int) -> int:
        value = self._board.read_register(offset)
        for name, kind in EVENTS.items():
            if kind is None:
                happened = offset == self._step
            else:
                happened = offset == self._argument and value == host_argument(kind, 0)
            if happened:
                self.events[name].append(self._interrupt)
        return value

    def write_register(self, offset: int, value: int) -> None:
        self._board.write_register(offset, value)

    def read(self, address: int, size: int) -> np.ndarray:
        return self._board.read(address, size)

    def write(self, address: int, values: np.ndarray | bytes | bytearray | memoryview) -> None:
        self._board.write(address, values)

    def wait_interrupt(self, timeout_cycles: int | None = None) -> bool:
        if self._enough(self):
            raise _Reached
        raised = self._board.wait_interrupt(timeout_cycles)
        self._interrupt = self._board.cycles()
        return raised


class _Decoding:
    """The run of a request, which can be simulated more than once.

    Raises
    ------
    ValueError
        If the model cannot be used or does not fit the accelerator.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._model: Model = load_model(request.model)
        self._prompt: Sequence[int] = self._model.tokenizer.encode(request.prompt)
        self._settings = Settings(request.rows, request.draft_length, DEFAULT_THRESHOLD)
        c = self._model.config
        self._encoded: Mapping[str, EncodedTensor] = encode_model(
            self._model, FormatConfig(), FormatConfig()
        )
        self._capacity = min(c.context, len(self._prompt) + request.max_tokens) + request.rows
        self.system = system_for(
            self._model, self._encoded, request.rows, request.cols, self._capacity
        )
        self._memory = MemoryOptions(
            MemoryLayout(self.system, c, self._encoded, self._capacity).size
        )
        self._verilog = generate_top(self.system)

    def simulate(self, waves: Waves, enough: Callable[[SimulatedBoard, _Watch], bool]) -> _Watch:
        """Decode until there is `enough`, or to the end."""
        with SimulatedBoard(self._verilog, self.system, self._memory, waves) as board:
            watch = _Watch(board, self.system, lambda watch: enough(board, watch))
            try:
                host = Host(watch, self._model, self._encoded, capacity=self._capacity)
                for _ in host.generate(
                    self._prompt,
                    max_tokens=self._request.max_tokens,
                    settings=self._settings,
                    stop_ids=self._model.tokenizer.stop_ids,
                ):
                    pass
            except _Reached:
                pass
            self.cycles = board.cycles()
        return watch


class Trace(NamedTuple):
    """A signal in the layout: its name within the group's scope, what is shown in its place, and
    how: "hex", "dec", or the name of a table of `value_names`."""

    signal: str
    label: str = ""
    form: str = "hex"


class Group(NamedTuple):
    """Signals that are shown together, of an instance or more."""

    name: str
    traces: tuple[Trace, ...]


def _stream(path: str, *payload: Trace) -> tuple[Trace, ...]:
    """Handshake and payload of a stream."""
    name = path.rpartition(".")[2]
    shown = payload or (Trace(""),)
    return (
        Trace(f"{path}__valid", f"{name} valid"),
        Trace(f"{path}__ready", f"{name} ready"),
        *(Trace(f"{path}__payload{t.signal}", t.label or f"{name} payload", t.form) for t in shown),
    )


def _channel(port: str, name: str, *fields: str) -> tuple[Trace, ...]:
    """Handshake and fields of an AXI channel of the accelerator."""
    return tuple(Trace(f"{port}_{name}{field}") for field in ("valid", "ready", *fields))


_TOP = "board"
_ACCELERATOR = f"{_TOP}.accelerator"
_CONTROL = f"{_ACCELERATOR}.control"
_SPECULATION = f"{_ACCELERATOR}.speculation"
_WALKER = f"{_ACCELERATOR}.walker.steps"
_DATAPATH = f"{_ACCELERATOR}.datapath"
_LITE, _WEIGHTS, _DATA = (
    f"{_TOP}.{port}" for port in ("s_axi_control", "m_axi_weights", "m_axi_data")
)

#: What the save file shows, from top to bottom.
LAYOUT = (
    Group("Clock", (Trace(f"{_TOP}.cycle", "cycle", "dec"),)),
    Group(
        "Run",
        (
            Trace(f"{_CONTROL}.status.status", "state", "State"),
            Trace(f"{_TOP}.irq"),
            Trace(f"{_CONTROL}.begin"),
            Trace(f"{_CONTROL}.finished"),
            Trace(f"{_CONTROL}.host_request"),
            Trace(f"{_CONTROL}.host_answer"),
            Trace(f"{_CONTROL}.step_request"),
            Trace(f"{_CONTROL}.step_answer"),
            Trace(f"{_CONTROL}.clear"),
            Trace(f"{_CONTROL}.drained"),
            Trace(f"{_CONTROL}.status.error", "error", "ErrorCode"),
        ),
    ),
    Group(
        "Pass and step",
        (
            Trace(f"{_SPECULATION}.fsm_state", "speculation", "Speculation"),
            Trace(f"{_SPECULATION}.pass_status.kind", "pass", "PassKind"),
            Trace(f"{_SPECULATION}.pass_status.index", "draft pass", "dec"),
            Trace(f"{_SPECULATION}.pass_status.rows", "rows", "dec"),
            Trace(f"{_SPECULATION}.pass_position", "KV entries before", "dec"),
            *_stream(f"{_SPECULATION}.passes", Trace(".kind", "passes kind", "PassKind")),
            Trace(f"{_SPECULATION}.pass_done"),
            Trace(f"{_SPECULATION}.chain", "chain", "dec"),
            Trace(f"{_SPECULATION}.root", "root token", "dec"),
            Trace(f"{_SPECULATION}.step.committed", "last step: committed", "dec"),
            Trace(f"{_SPECULATION}.step.accepted", "last step: accepted", "dec"),
            Trace(f"{_SPECULATION}.step.hit_row", "last step: alternate's row", "dec"),
            Trace(f"{_SPECULATION}.ring_index", "tokens in the ring", "dec"),
        ),
    ),
    Group(
        "Program walker",
        (
            Trace(f"{_WALKER}.state_state", "state", "Walker"),
            Trace(f"{_WALKER}.number", "descriptor", "dec"),
            Trace(f"{_WALKER}.kind", "kind", "Kind"),
            Trace(f"{_WALKER}.address"),
            Trace(f"{_WALKER}.host_argument"),
            Trace(f"{_WALKER}.started"),
            Trace(f"{_WALKER}.idle", "datapath idle"),
            Trace(f"{_WALKER}.done"),
            Trace(f"{_WALKER}.error", "error", "ErrorCode"),
        ),
    ),
    Group(
        "Jobs",
        (
            *_stream(
                f"{_DATAPATH}.jobs",
                Trace(".mode", "mode", "Mode"),
                Trace(".tokens", "tokens", "dec"),
                Trace(".k", "k", "dec"),
                Trace(".o", "o", "dec"),
                Trace(".rank", "rank"),
            ),
            Trace(f"{_DATAPATH}.current.kind", "under way: kind", "Under way"),
            Trace(f"{_DATAPATH}.current.mode", "under way: mode", "Mode"),
        ),
    ),
    Group(
        "Engine",
        (
            Trace(f"{_DATAPATH}.step", "weight word taken"),
            *(
                Trace(f"{_DATAPATH}.stalls.{name}", f"stall: {name}")
                for name in ("weights", "groups", "activations", "results")
            ),
            Trace(f"{_DATAPATH}.nonfinite"),
        ),
    ),
    Group("Weight words", _stream(f"{_DATAPATH}.weights")),
    Group("Group bytes", _stream(f"{_DATAPATH}.groups")),
    Group("Activations", _stream(f"{_DATAPATH}.activations")),
    Group(
        "Results",
        _stream(
            f"{_DATAPATH}.results",
            Trace(".row", "row", "dec"),
            Trace(".strobe", "columns"),
            Trace(".last", "last"),
            Trace(".data", "FP32 results"),
        ),
    ),
    Group(
        "Ranking of row 0",
        (
            Trace(f"{_DATAPATH}.ranker.busy", "busy"),
            *(
                Trace(f"{_DATAPATH}.rank_entries[{i}].{name}", f"{name} {i}", form)
                for i in range(2)
                for name, form in (("token", "dec"), ("logit", "hex"))
            ),
        ),
    ),
    Group(
        "AXI weights: read",
        (
            *_channel(_WEIGHTS, "ar", "id", "addr", "len"),
            *_channel(_WEIGHTS, "r", "id", "last", "resp", "data"),
        ),
    ),
    Group(
        "AXI data: read",
        (
            *_channel(_DATA, "ar", "id", "addr", "len"),
            *_channel(_DATA, "r", "id", "last", "resp", "data"),
        ),
    ),
    Group(
        "AXI data: write",
        (
            *_channel(_DATA, "aw", "addr", "len"),
            *_channel(_DATA, "w", "strb", "last", "data"),
            *_channel(_DATA, "b", "resp"),
        ),
    ),
    Group(
        "AXI-Lite registers",
        (
            *_channel(_LITE, "aw", "addr"),
            *_channel(_LITE, "w", "data"),
            *_channel(_LITE, "b", "resp"),
            *_channel(_LITE, "ar", "addr"),
            *_channel(_LITE, "r", "data", "resp"),
        ),
    ),
)


def value_names(config: AcceleratorConfig) -> dict[str, dict[int, str]]:
    """What the values of enumerations are called, by the tables' names."""
    kinds = {kind.value: kind.name for kind in DescriptorKind}
    return {
        "State": {value: name for name, (value, _) in STATES.items()},
        "ErrorCode": {code.value: code.name for code in ErrorCode},
        "PassKind": {kind.value: kind.name for kind in PassKind},
        "Mode": {mode.value: mode.name for mode in Mode},
        "Kind": kinds,
        "Under way": {0: "-", **kinds},
        "Speculation": _state_names(SpeculationController(config), "fsm_state"),
        "Walker": _state_names(ProgramWalker(config), "state_state"),
    }


def _state_names(unit: Elaboratable, register: str) -> dict[int, str]:
    """States of the state machine in `unit` whose register has this name."""
    fragments = [Fragment.get(unit, None)]
    for fragment in fragments:
        fragments += [inner for inner, *_ in fragment.subfragments]
        for statement in itertools.chain(*fragment.statements.values()):
            state = getattr(statement, "test", None)  # of a Switch
            if isinstance(state, Signal) and state.name == register:
                return dict(_decoded(state))
    raise LookupError(f"{type(unit).__name__} has no state machine {register}")


def _decoded(state: Signal) -> Iterator[tuple[int, str]]:
    """Values of a state machine's register and their names."""
    for value in itertools.count():
        try:
            name, _, _ = state.decoder(value).rpartition("/")
        except KeyError:
            return
        yield value, name


def write_layout(
    save: Path, recording: Path, config: AcceleratorConfig, marker: int | None = None
) -> None:
    """Write the save file, and beside it the tables that give values their names.

    Parameters
    ----------
    save : Path
        Ends in .gtkw.
    recording : Path
        The FST; signals of the layout that it lacks are left out.
    config : AcceleratorConfig
    marker : int, optional
        Cycles from the window's start to the marker.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    first, last, signals = fst.contents(recording)
    recorded = {_RANGE.sub("", name): name for name in signals}
    tables = {name: _Table(save, name, names) for name, names in value_names(config).items()}
    with save.open("w") as file:
        layout = GTKWSave(file)
        layout.dumpfile(str(recording))
        layout.savefile(str(save))
        layout.timestart(first)
        layout.zoom_markers(
            -math.log2(max(1, last - first) / _FRAMES),
            -1 if marker is None else first + marker * _CLOCK_PS,
        )
        layout.size(1600, 1000)
        layout.signals_width(330)
        layout.sst_expanded(False)
        for group in LAYOUT:
            with layout.group(group.name):
                for trace in group.traces:
                    if name := recorded.get(trace.signal):
                        _write_trace(layout, name, trace, signals[name], tables)


def _write_trace(
    layout: GTKWSave, name: str, trace: Trace, bits: int, tables: Mapping[str, _Table]
) -> None:
    label = trace.label or trace.signal.rpartition(".")[2]
    if trace.form in tables:
        table = tables[trace.form]
        layout.trace(name, label, datafmt="dec", translate_filter_file=str(table.write()))
    else:
        layout.trace(name, label, datafmt="bin" if bits == 1 else trace.form)


class _Table:
    """Names of values, in a file for GTKWave."""

    def __init__(self, save: Path, name: str, names: Mapping[int, str]) -> None:
        self._path = save.absolute().with_name(f"{save.stem}-{name.lower().replace(' ', '-')}.txt")
        self._names = names

    def write(self) -> Path:
        """Write the file, whose path is returned."""
        self._path.write_text(make_translation_filter([*self._names.items()], "dec") + "\n")
        return self._path


def run(request: Request) -> None:
    """Record a window and write the layout.

    Raises
    ------
    ValueError
        If an option is impossible, the model cannot be used, or the run ends before the window.
    OSError
        If a file cannot be written, or the simulation fails.
    """
    if request.start is not None and request.at is not None:
        raise ValueError("--start and --at exclude each other: both say where the window begins")
    request.output.mkdir(parents=True, exist_ok=True)
    decoding = _Decoding(request)
    recording = request.output / f"{_STEM}.fst"
    recording.unlink(missing_ok=True)
    with _status() as show:
        show("building the simulation")
        start, marker = request.start, None
        if start is None:
            event = _find(decoding, request, recording)
            start = max(0, event - BEFORE)
            marker = event - start
        show("recording")
        waves = Waves(recording, start, start + request.cycles, request.array)
        decoding.simulate(waves, lambda board, _: board.cycles() >= waves.stop)
    if decoding.cycles <= start:
        raise ValueError(
            f"the run ends at cycle {decoding.cycles}, before the window at {start}: generate more "
            "with --max-tokens, or begin earlier"
        )
    save = recording.with_suffix(".gtkw")
    write_layout(save, recording, decoding.system, marker)
    stop = min(waves.stop, decoding.cycles)
    size = recording.stat().st_size / 1e6
    print(f"{recording}: cycles {start:,} to {stop - 1:,}, {size:.1f} MB")
    print(f"{save}: show it with gtkwave {save}")


def _find(decoding: _Decoding, request: Request, recording: Path) -> int:
    """The cycle of the event that the window begins at."""
    name = request.at or "draft"
    # The same build as for the recording.
    never = Waves(recording, _NEVER, _NEVER + 1, request.array)
    watch = decoding.simulate(never, lambda _, watch: len(watch.events[name]) >= request.nth)
    cycles = watch.events[name]
    if len(cycles) < request.nth:
        raise ValueError(
            f"--nth is {request.nth}, but the run has {len(cycles)} of {name}: generate more with "
            "--max-tokens"
        )
    return cycles[request.nth - 1]


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """Shows what is being done, on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield status.update
