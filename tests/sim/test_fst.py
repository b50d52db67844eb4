# SPDX-License-Identifier: Apache-2.0
"""Value change dumps as FST."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import pywellen

from speq.sim import fst
from tests.sim.fst_reader import FstFile

SEED = int(os.environ.get("SPEQ_SEED", "0"))
WIDTHS = (1, 1, 3, 8, 9, 64, 300, 2)


def _vcd(path: Path, steps: int) -> dict[int, dict[int, str]]:
    """Write a random dump, of which signal 1 never changes and 7 comes late; its values by time."""
    print(f"SPEQ_SEED={SEED}")
    source = random.Random(SEED)
    lines = ["$version test $end", "$timescale 10ns", "$end", " $scope module top $end"]
    for i, width in enumerate(WIDTHS):
        bits = f" [{width - 1}:0]" if width > 1 else ""
        lines.append(f"  $var wire {width} {chr(33 + i)} s{i}{bits} $end")
        if i == 3:
            lines += ["  $scope module inner $end", "   $var reg 8 $ a.b [7:0] $end"]
            lines.append("  $upscope $end")
    lines += [" $upscope $end", "$enddefinitions $end"]
    time, result = 700, {}
    for step in range(steps):
        result[time] = values = {}
        lines.append(f"#{time}")
        for i, width in enumerate(WIDTHS):
            if (step == 0 and i < 7) or (step and i != 1 and source.random() < 0.4):
                digits = "01" if source.random() < 0.8 else "01xz"
                values[i] = "".join(source.choices(digits, k=width))
                value = values[i] if width == 1 else f"b{values[i]} "
                lines.append(f"{value}{chr(33 + i)}")
        time += source.choice((1, 5, 1000))
    path.write_text("\n".join(lines) + "\n")
    return result


def _expected_changes(dump: dict[int, dict[int, str]]) -> list[tuple[int, int, str]]:
    """Time, signal and value of each change, x being the value before the first one."""
    changes, values = [], {i: "x" * width for i, width in enumerate(WIDTHS)}
    for time, changed in dump.items():
        for i, value in changed.items():
            if values[i] != value:
                changes.append((time, i, value))
            values[i] = value
    return sorted(changes)


def test_contents_are_those_of_the_dump(tmp_path) -> None:
    expected = _vcd(tmp_path / "a.vcd", 300)
    fst.convert(tmp_path / "a.vcd", tmp_path / "a.fst")
    file = FstFile(tmp_path / "a.fst")
    found = {time: {} for time in expected}
    for time, handle, value in file.changes:
        found[time][handle - 1] = value
    assert found == expected
    assert (file.first, file.last, file.timescale) == (min(expected), max(expected), -8)
    assert tuple(file.widths.values()) == WIDTHS
    names = {f"top.s{i}{f' [{w - 1}:0]' if w > 1 else ''}": i + 1 for i, w in enumerate(WIDTHS)}
    assert file.names == names | {"top.inner.a.b [7:0]": 4}
    shown = {name.replace(" ", ""): file.widths[handle] for name, handle in file.names.items()}
    assert fst.contents(tmp_path / "a.fst") == (file.first, file.last, shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fst", "a.vcd"]


def test_wellen_reads_the_same(tmp_path) -> None:
    """Wellen is another program's reader, that of Surfer."""
    expected = _vcd(tmp_path / "a.vcd", 300)
    fst.convert(tmp_path / "a.vcd", tmp_path / "a.fst")
    waveform = pywellen.Waveform(str(tmp_path / "a.fst"))
    assert waveform.timescale.factor == 10 and waveform.timescale.unit.to_exponent() == -9
    signals = {variable.full_name: variable for variable in waveform.all_vars()}
    assert set(signals) == {f"top.s{i}" for i in range(len(WIDTHS))} | {"top.inner.a.b"}
    assert signals["top.inner.a.b"].length == 8
    assert signals["top.s7"].signal.value_at(min(expected)) is None
    values = {}
    for time, changed in expected.items():
        values |= changed
        for i, value in values.items():
            found = signals[f"top.s{i}"].signal.value_at(time)
            assert found == (int(value, 2) if set(value) <= set("01") else value), (time, i)


def test_gtkwave_reads_the_same(tmp_path) -> None:
    if shutil.which("fst2vcd") is None:
        pytest.skip("needs fst2vcd of GTKWave")
    expected = _vcd(tmp_path / "a.vcd", 300)
    fst.convert(tmp_path / "a.vcd", tmp_path / "a.fst")
    subprocess.run(["fst2vcd", tmp_path / "a.fst", "-o", tmp_path / "b.vcd"], check=True)
    text = (tmp_path / "b.vcd").read_text()
    codes = {}
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["$var"] and words[4].startswith("s"):
            codes[words[3]] = int(words[4][1:])
    current = {i: "x" * width for i, width in enumerate(WIDTHS)}
    found, now = [], None
    _, _, body = text.partition("$enddefinitions $end")
    for line in body.splitlines():
        if line.startswith("#"):
            now = int(line[1:])
        elif line and line[0] in "01xzb":
            value, code = line[1:].split() if line[0] == "b" else (line[0], line[1:])
            if current[codes[code]] != value:
                found.append((now, codes[code], value))
            current[codes[code]] = value
    assert sorted(found) == _expected_changes(expected)


def test_short_values_are_extended(tmp_path) -> None:
    declarations = "$timescale 1ps $end\n$scope module t $end\n$var wire 4 ! s [3:0] $end\n"
    values = "$upscope $end\n$enddefinitions $end\n#1\nb1 !\n#2\nbx !\n#3\nb0z1 !\n"
    (tmp_path / "a.vcd").write_text(declarations + values)
    fst.convert(tmp_path / "a.vcd", tmp_path / "a.fst")
    changes = FstFile(tmp_path / "a.fst").changes
    assert changes == [(1, 1, "0001"), (2, 1, "xxxx"), (3, 1, "00z1")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no dump\n", "no VCD"),
        ("", "no VCD"),
        ("$timescale 1ps $end $scope module t $end\n", "no VCD"),
        ("$enddefinitions $end\n", "no values"),
        ("$var real 64 ! s $end $enddefinitions $end\n#1\nr1.5 !\n", "real numbers"),
    ],
)
def test_what_is_no_dump_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "a.vcd").write_text(text)
    with pytest.raises(ValueError, match=message):
        fst.convert(tmp_path / "a.vcd", tmp_path / "a.fst")
    assert not (tmp_path / "a.fst").exists()
    with pytest.raises(ValueError, match="no FST"):
        fst.contents(tmp_path / "a.vcd")


def test_files_that_cannot_be_had(tmp_path) -> None:
    _vcd(tmp_path / "a.vcd", 2)
    with pytest.raises(FileNotFoundError, match=r"none\.vcd"):
        fst.convert(tmp_path / "none.vcd", tmp_path / "a.fst")
    with pytest.raises(FileNotFoundError, match="none"):
        fst.convert(tmp_path / "a.vcd", tmp_path / "none" / "a.fst")
    with pytest.raises(FileNotFoundError, match=r"none\.fst"):
        fst.contents(tmp_path / "none.fst")
