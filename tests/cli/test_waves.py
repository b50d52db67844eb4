# SPDX-License-Identifier: Apache-2.0
"""`speq waves`: what is recorded, that the layout shows it, and how it fails."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import speq.cli
from speq.cli.waves import BEFORE
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.register_map import STATES
from speq.hw.engine_config import EngineConfig
from speq.sim.board_server import CLOCK_NS
from speq.sim.gtkwave import groups, value_names
from tests.model.small_models import random_weights, small_config, write_gguf
from tests.sim.fst_reader import FstFile

SEED = int(os.environ.get("SPEQ_SEED", "0"))
#: One accelerator for all tests, as it takes long to build.
ARRAY = ("--rows", 2, "--cols", 4)
CONFIG = AcceleratorConfig(EngineConfig(rows=2, cols=4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A GGUF file with a random model."""
    print(f"SPEQ_SEED={SEED}")
    config = small_config(tied_head=False, context=64, blocks=1)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return str(path)


@pytest.fixture
def speq_waves(checkpoint, monkeypatch, capsys, tmp_path):
    """Call `speq waves` with arguments: exit code, output, errors, folder."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it
    monkeypatch.delenv("SPEQ_DEBUG", raising=False)

    def call(*arguments: object) -> SimpleNamespace:
        folder = tmp_path / "waves"
        command = ["speq", "waves", checkpoint, "--prompt", "hello hello", "-o", folder]
        command += ["--max-tokens", 3, *ARRAY, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as stop:
            speq.cli.main()
        captured = capsys.readouterr()
        return SimpleNamespace(
            code=stop.value.code or 0, out=captured.out, err=captured.err, folder=folder
        )

    return call


def _file(folder: Path) -> FstFile:
    return FstFile(folder / "speq.fst")


def _found(folder: Path, name: str) -> Path:
    """What the save file in a folder means by a name, as GTKWave finds it: by the way from the
    folder of [savefile] to it, which both must have one for."""
    (written,) = re.findall(r'(?m)^\[savefile\] "(.*)"$', (folder / "speq.gtkw").read_text())
    before, _, last = written.rpartition("/")
    assert last == "speq.gtkw" and len(before) > 1 and name.startswith(f"{before}/")
    return folder / os.path.relpath(name, before)


def _shown(folder: Path) -> list[str]:
    """Signals of the save file; tables of values must exist."""
    names = []
    for line in (folder / "speq.gtkw").read_text().splitlines():
        if table := re.fullmatch(r"\^\d+ (.*)", line):
            rows = _found(folder, table[1]).read_text().splitlines()
            assert rows and all(re.fullmatch(r"\d+ .+", row) for row in rows)
        elif trace := re.fullmatch(r"\+\{.+\} (.*)", line):
            names.append(trace[1])
    return names


def _traces(config: AcceleratorConfig) -> int:
    """Signals that the layout has."""
    return sum(len(group.traces) for group in groups(config))


def _marker(folder: Path) -> int:
    (line,) = re.findall(r"(?m)^\*.*$", (folder / "speq.gtkw").read_text())
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("event", "nth", "kind"),
    [("prompt", 1, PassKind.SINGLE), ("draft", 1, PassKind.DRAFT), ("verify", 2, PassKind.VERIFY)],
)
def test_window_at_a_pass(speq_waves, event, nth, kind):
    made = speq_waves("--at", event, "--nth", nth, "--cycles", 300)
    assert made.code == 0, made.err
    file = _file(made.folder)
    recorded = {name.replace(" ", "") for name in file.names}
    shown = _shown(made.folder)
    assert set(shown) <= recorded and len(shown) == _traces(CONFIG)
    assert not any(".array." in name for name in recorded)
    # The edges of the clock, the first and the last included.
    assert file.last - file.first in range(599 * CLOCK_NS * 500, 601 * CLOCK_NS * 500)
    start, stop = re.search(r"cycles ([\d,]+) to ([\d,]+),", made.out).groups()
    assert int(stop.replace(",", "")) == int(start.replace(",", "")) + 299
    # A look at the registers finds the pass at the marker, behind its start.
    marker = _marker(made.folder)
    assert marker == file.first + BEFORE * CLOCK_NS * 1000
    control = "board.accelerator.control.status.status [2:0]"
    passes = "board.accelerator.speculation.pass_status.kind [1:0]"
    assert file.value(control, marker) == STATES["RUNNING"][0]
    assert file.value(passes, marker) == kind.value
    started = [
        time
        for time, handle, value in file.changes
        if handle == file.names["board.accelerator.speculation.passes__valid"] and value == "1"
    ]
    assert any(file.first < time < marker for time in started)
    # The counters of vector work go on.
    work, stalls = (
        [file.value(f"board.accelerator.control.{name} [63:0]", at) for at in (marker, file.last)]
        for name in ("vector_cycles", "vector_stalls")
    )
    assert work[0] < work[1] and stalls[0] <= stalls[1] <= work[1]
    cycle = file.value("board.cycle [63:0]", marker)
    assert cycle == int(start.replace(",", "")) + BEFORE + 1


def check_moved(folder: Path) -> None:
    """What was recorded is complete wherever it lies."""
    moved = folder.with_name("elsewhere")
    shutil.move(folder, moved)
    text = (moved / "speq.gtkw").read_text()
    (recording,) = re.findall(r'(?m)^\[dumpfile\] "(.*)"$', text)
    assert _found(moved, recording).resolve() == moved / "speq.fst"
    assert len(_shown(moved)) == _traces(CONFIG)
    assert not re.search(r'(?m)^(\^\d+ |\[.*\] ")/', text) and str(folder.parent) not in text
    shutil.move(moved, folder)


def test_window_at_a_step_and_by_cycles(speq_waves):
    made = speq_waves("--at", "step", "--cycles", 150)
    assert made.code == 0, made.err
    check_moved(made.folder)
    marker = _marker(made.folder)
    committed = "board.accelerator.speculation.step.committed [7:0]"
    at_step = _file(made.folder)
    assert at_step.value("board.accelerator.control.step_request", marker) == 1
    assert at_step.value(committed, marker) >= 1
    # The same cycles once more.
    start = re.search(r"cycles ([\d,]+) to", made.out)[1].replace(",", "")
    again = speq_waves("--start", start, "--cycles", 150)
    assert again.code == 0, again.err
    by_cycles = _file(again.folder)
    assert by_cycles.names == at_step.names
    # The memory's unused bits are whatever the simulator has found there.
    signals = {h for name, h in at_step.names.items() if name.startswith("board.accelerator.")}
    changes, changes_again = (
        [change for change in file.changes if change[1] in signals] for file in (at_step, by_cycles)
    )
    assert changes == changes_again and len(changes) > 1000
    assert _marker(again.folder) == -1


def test_window_and_the_end_of_the_run(speq_waves):
    late = speq_waves("--start", 1 << 40)
    assert late.code == 1 and late.err.count("\n") == 1 and not late.out
    assert f"before the window at {1 << 40}" in late.err
    assert not (late.folder / "speq.fst").exists()
    end = int(re.search(r"the run ends at cycle (\d+),", late.err)[1])
    made = speq_waves("--start", end - 100, "--cycles", 1000)
    assert made.code == 0, made.err
    assert f"cycles {end - 100:,} to {end - 1:,}," in made.out
    file = _file(made.folder)
    assert abs(file.value("board.cycle [63:0]", file.last) - end) <= 2
    rare = speq_waves("--at", "step", "--nth", 9)
    assert rare.code == 1 and rare.err.count("\n") == 1 and not rare.out
    assert re.search(r"--nth is 9, but the run has [1-3] of step:", rare.err)


def test_impossible_options(speq_waves, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for options, message in (
        (("--start", 5, "--at", "draft"), "--start and --at exclude each other"),
        (("--cols", 6), "cols is 6"),
        (("--lanes", 8), "lanes is 8; allowed are powers of two from 4 to 4"),
        (("--lanes", 0), "lanes is 0; only an accelerator with a vector unit"),
        (("--draft-length", 2), "draft length is 2"),
        (("-o", tmp_path / "file"), "file is not a folder"),
    ):
        made = speq_waves(*options)
        assert made.code == 1 and message in made.err, made.err
        assert made.err.count("\n") == 1 and not made.out


@pytest.mark.parametrize("lanes", [0, 4])
def test_values_have_names(lanes):
    config = replace(CONFIG, lanes=lanes)
    names = value_names(config)
    assert names["Walker"][0] == "FETCH" and "HOST" in names["Walker"].values()
    assert names["Speculation"][0] == "IDLE" and "COMMIT" in names["Speculation"].values()
    used = {trace.form for group in groups(config) for trace in group.traces}
    assert used - {"hex", "dec"} == set(names)
    labels = {trace.label for group in groups(config) for trace in group.traces}
    assert ({"VECTOR_CYCLES", "VECTOR_STALLS", "stall: operands"} <= labels) == bool(lanes)
    if lanes:
        states = names["Vector unit"].values()
        assert names["Vector unit"][0] == "IDLE" and {"HAND", "ALONE"} <= set(states)
        assert names["Operation"][12] == "MOVE"
