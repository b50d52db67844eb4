# SPDX-License-Identifier: Apache-2.0
"""GTKWave's save file for recorded waves of the simulated board.

It shows the signals which tell what the accelerator is doing, in groups and with names for states
and kinds.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from amaranth.hdl import Elaboratable, Fragment, Signal
from vcd.gtkw import GTKWSave, make_translation_filter

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.descriptor import DescriptorKind, Target, VectorOperation
from speq.hw.control.program_walker import ProgramWalker
from speq.hw.control.register_map import STATES
from speq.hw.control.speculation_controller import SpeculationController
from speq.hw.engine_config import Mode
from speq.hw.vector.vector_unit import VectorUnit
from speq.sim import fst
from speq.sim.board_server import CLOCK_NS

_CLOCK_PS = CLOCK_NS * 1000  # in which FST counts
# GTKWave's zoom is minus the log2 of the time in a frame; its window is about so many of them wide.
_FRAMES = 6
_RANGE = re.compile(r"\[\d+:\d+\]$")  # of a vector's bits, behind its name


class Trace(NamedTuple):
    """A signal in the layout: its name within the group's scope, what is shown in its place, and
    how: "hex", "dec", or the name of a table of `value_names`."""

    signal: str
    label: str = ""
    form: str = "hex"


class Group(NamedTuple):
    """Signals that are shown together, of an instance or more; `vector`: of the vector unit, which
    not every accelerator has."""

    name: str
    traces: tuple[Trace, ...]
    vector: bool = False


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
_VECTOR = f"{_DATAPATH}.vector.sequence"
_CORE = f"{_DATAPATH}.vector.core"
_WRITER = f"{_DATAPATH}.vector.writer"
_LITE, _WEIGHTS, _DATA = (
    f"{_TOP}.{port}" for port in ("s_axi_control", "m_axi_weights", "m_axi_data")
)

#: What a save file can show, from top to bottom.
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
            Trace(f"{_SPECULATION}.used", "rows so far", "dec"),
            Trace(f"{_SPECULATION}.matcher.busy", "history searched"),
            Trace(f"{_SPECULATION}.root", "root token", "dec"),
            Trace(f"{_SPECULATION}.step.committed", "last step: committed", "dec"),
            Trace(f"{_SPECULATION}.step.accepted", "last step: accepted", "dec"),
            Trace(f"{_SPECULATION}.step.last_row", "last step: last token's row", "dec"),
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
                Trace(f"{_DATAPATH}.engine.stalls.{name}", f"stall: {name}")
                for name in ("weights", "groups", "activations", "results")
            ),
            Trace(f"{_DATAPATH}.engine.nonfinite"),
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
        "Vector unit",
        (
            Trace(f"{_VECTOR}.fsm_state", "state", "Vector unit"),
            Trace(f"{_VECTOR}.idle"),
            Trace(f"{_VECTOR}.stalls", "stall: operands"),
            Trace(f"{_CONTROL}.vector_cycles", "VECTOR_CYCLES", "dec"),
            Trace(f"{_CONTROL}.vector_stalls", "VECTOR_STALLS", "dec"),
            Trace(f"{_VECTOR}.command.operation", "operation", "Operation"),
            Trace(f"{_VECTOR}.command.target", "target", "Target"),
            *(
                Trace(f"{_VECTOR}.command.{name}", name, form)
                for form, names in (
                    ("dec", ("rows", "k", "o", "sharing", "position", "source")),
                    ("hex", ("first", "second", "results", "inner", "outer")),
                    ("hex", ("argument", "detail", "values")),
                )
                for name in names
            ),
            *_stream(f"{_CORE}.x"),
            *_stream(f"{_CORE}.y"),
            *_stream(f"{_CORE}.results"),
            Trace(f"{_WRITER}.busy", "results are written"),
        ),
        vector=True,
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


def groups(config: AcceleratorConfig) -> list[Group]:
    """What is shown of an accelerator."""
    return [group for group in LAYOUT if config.lanes or not group.vector]


def value_names(config: AcceleratorConfig) -> dict[str, dict[int, str]]:
    """What the values of enumerations are called, by the tables' names."""
    kinds = {kind.value: kind.name for kind in DescriptorKind}
    vector: dict[str, dict[int, str]] = {}
    if config.lanes:
        unit = VectorUnit(config)
        for module in unit.modules.values():
            Fragment.get(module, None)  # Amaranth warns of what is never elaborated
        vector = {
            "Operation": {operation.value: operation.name for operation in VectorOperation},
            "Target": {target.value: target.name for target in Target},
            "Vector unit": _state_names(unit, "fsm_state", "sequence"),
        }
    return {
        "State": {value: name for name, (value, _) in STATES.items()},
        "ErrorCode": {code.value: code.name for code in ErrorCode},
        "PassKind": {kind.value: kind.name for kind in PassKind},
        "Mode": {mode.value: mode.name for mode in Mode},
        "Kind": kinds,
        "Under way": {0: "-", **kinds},
        "Speculation": _state_names(SpeculationController(config), "fsm_state"),
        "Walker": _state_names(ProgramWalker(config), "state_state"),
        **vector,
    }


def _state_names(unit: Elaboratable, register: str, part: str | None = None) -> dict[int, str]:
    """States of the state machine in `unit`, or the part of it, whose register has this name."""
    fragments = [Fragment.get(unit, None)]
    if part is not None:
        fragments = [inner for inner, name, _ in fragments[0].subfragments if name == part]
    for fragment in fragments:
        fragments += [inner for inner, *_ in fragment.subfragments]
        for statement in itertools.chain(*fragment.statements.values()):
            state: Any = getattr(statement, "test", None)  # of a Switch
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


def layout_marks(stem: str) -> dict[str, bytes]:
    """Names of what `write_layout` writes for STEM.gtkw, and patterns of how each begins.

    What GTKWave has stored under the name begins otherwise.
    """
    forms = {trace.form for group in LAYOUT for trace in group.traces} - {"hex", "dec"}
    tables = {_table_name(stem, form): rb"\d+ [\w -]+\n" for form in forms}
    return {f"{stem}.gtkw": rb"\[\*\] Written by SPEQ\n", **tables}


def write_layout(
    save: Path,
    recording: Path,
    config: AcceleratorConfig,
    marker: int | None = None,
    *,
    folder: Path,
) -> None:
    """Write the save file, and beside it the tables that give values their names.

    It names them and the recording relative to itself: all of them can be moved together.

    Parameters
    ----------
    save : Path
        Ends in .gtkw.
    recording : Path
        The FST, beside it; signals of the layout that it lacks are left out.
    config : AcceleratorConfig
    marker : int, optional
        Cycles from the window's start to the marker.
    folder : Path
        Where the recording lies and the files are written, from where they will move to `save`'s.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    first, last, signals = fst.contents(folder / recording.name)
    recorded = {_RANGE.sub("", name): name for name in signals}
    tables = {
        name: _Table(folder / _table_name(save.stem, name), names)
        for name, names in value_names(config).items()
    }
    with (folder / save.name).open("w") as file:
        layout = GTKWSave(file)
        layout.comment("Written by SPEQ")
        layout.dumpfile(_beside(recording.name), abspath=False)
        layout.savefile(_beside(save.name), abspath=False)
        layout.timestart(first)
        layout.zoom_markers(
            -math.log2(max(1, last - first) / _FRAMES),
            -1 if marker is None else first + marker * _CLOCK_PS,
        )
        layout.size(1600, 1000)
        layout.signals_width(330)
        layout.sst_expanded(False)
        for group in groups(config):
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
        layout.trace(name, label, datafmt="dec", translate_filter_file=table.write())
    else:
        layout.trace(name, label, datafmt="bin" if bits == 1 else trace.form)


def _table_name(stem: str, name: str) -> str:
    return f"{stem}-{name.lower().replace(' ', '-')}.txt"


def _beside(name: str) -> str:
    """The name of a file beside the save file, for GTKWave.

    GTKWave takes the way from where the save file was written ([savefile]) to another file, and
    goes it from where the save file is now. It needs a folder's name in both for that, which may be
    any; without it, older versions look in the working directory.
    """
    return f"././{name}"


class _Table:
    """Names of values, in a file for GTKWave."""

    def __init__(self, path: Path, names: Mapping[int, str]) -> None:
        self._path = path
        self._names = names

    def write(self) -> str:
        """Write the file; what the save file calls it."""
        text = make_translation_filter([*self._names.items()], "dec") + "\n"
        self._path.write_text(text)
        return _beside(self._path.name)
