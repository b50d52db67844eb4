# SPDX-License-Identifier: Apache-2.0
"""`speq explore`: speeds behind slow memories, sizes, the front, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from speq.cli.fpga import PARTS
from speq.cli.sizes import Limit, area, chosen_part, taken
from speq.cli.unit_sizes import AREAS, MEASURED
from speq.host.cycles import predicted_passes
from speq.host.exploration import (
    Configuration,
    Decoding,
    Point,
    Speed,
    configurations,
    mark_front,
    speed,
)
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.model.cycles import uniform_formats
from speq.model.number_format import FormatConfig
from speq.model.prediction import predict
from tests.model.small_models import small_config

MODEL = small_config(tied_head=False, context=64)
DECODING = Decoding(MODEL, uniform_formats(MODEL, FormatConfig()), None, 0, 0.8, 20, 100.0, 1e6, 16)
SMALL = Configuration(4, 8, 4, 128, 128)
SWEEP = ("--bandwidth", 1, "--context", 20, "--rows", 2, "--cols", 4, "--cols", 8, "--lanes", 4)


def test_configurations():
    found = configurations([4, 4], [8, 16], [4, 16])
    assert len(found) == len(set(found)) == 4 + 2 * 4  # 16 lanes need 16 columns
    assert Configuration(4, 16, 16, 128, 256) in found
    assert all(c.accelerator().lanes == c.lanes for c in found)
    assert len(configurations([2], [4], [4])) == 1  # no port is narrower than 64 bits
    with pytest.raises(ValueError, match="no configuration is left"):
        configurations([16], [8], [4])
    with pytest.raises(ValueError, match="lanes is 5"):
        configurations([4], [8], [5])


def test_speed_is_the_predicted_one():
    passes = predicted_passes(
        MODEL, DECODING.formats, rows=4, cols=8, lanes=4, latency=16, context=20
    )
    p = predict(passes, 0.8, 20)
    assert speed((DECODING, SMALL)) == Speed(p.length, 1e8 / p.plain, 1e8 / p.cycles_per_token, 1.6)


def test_the_array_waits_for_memory_and_port():
    """What it takes of a bandwidth is never more than that, and than the port's."""
    fast = speed((DECODING, SMALL))
    half = speed((replace(DECODING, bandwidth=0.8), SMALL))
    assert half.bandwidth == pytest.approx(0.8)
    assert speed((DECODING, replace(SMALL, weights_bits=64))) == half
    assert 0.5 < half.plain / fast.plain < 0.8  # vector work does not become slower
    # Where weights are everything, speed follows the bandwidth, whatever the array.
    slow = [
        speed((replace(DECODING, bandwidth=bandwidth), c)).plain
        for bandwidth in (0.01, 0.02)
        for c in (SMALL, replace(SMALL, cols=16))
    ]
    assert slow[0] == pytest.approx(slow[1], rel=0.02)
    assert slow[2] == pytest.approx(2 * slow[0], rel=0.02)


def test_sizes_are_those_of_measured_units():
    def config(rows: int, cols: int, lanes: int) -> AcceleratorConfig:
        return AcceleratorConfig(EngineConfig(rows, cols), lanes=lanes)

    usual = taken(config(8, 16, 8)).kinds
    more = taken(config(9, 16, 8)).kinds
    fp16 = MEASURED["pe_fp16"]
    assert [more[kind] - usual[kind] for kind in usual] == pytest.approx([16 * n for n in fp16])
    more = taken(config(8, 16, 16)).kinds
    lane, sigmoid = (MEASURED[name] for name in ("lane", "shared_sigmoid"))
    added = [8 * a + 2 * b for a, b in zip(lane, sigmoid, strict=True)]
    assert [more[kind] - usual[kind] for kind in usual] == pytest.approx(added)
    assert area(config(9, 16, 8)) - area(config(8, 16, 8)) == pytest.approx(
        16 * AREAS["pe_fp16"] / 1e6
    )


def test_what_fits():
    found = configurations([4, 8], [8, 64], [4])
    part = next(part for part in PARTS if part.name.startswith("K26"))
    fitting = Limit(part).fitting(found)
    assert 0 < len(fitting) < len(found) and all(size <= 1 for size in fitting.values())
    for c in found:
        assert (c in fitting) == taken(c.accelerator()).fits(part)
    smallest = min(Limit().fitting(found).values())
    assert Limit(area=smallest).fitting(found).keys() == {
        c for c in found if area(c.accelerator()) == smallest
    }


def test_the_front():
    def point(size: float, rate: float, bandwidth: float) -> Point:
        return Point(SMALL, size, Speed(1, 1.0, rate, bandwidth))

    points = [point(2, 10, 1), point(2, 10, 1), point(3, 10, 1), point(3, 9, 0.5), point(1, 1, 1)]
    assert [p.front for p in mark_front(points)] == [True, False, False, True, True]


def test_a_run_and_another(speq_command, tmp_path: Path, monkeypatch):
    output, report = tmp_path / "out", tmp_path / "points.json"
    call = ("explore", "tiny", *SWEEP, "--jobs", 1, "-o", output, "--json", report)
    first = speq_command(*call)
    assert first.code == 0, first.err
    assert {f.name for f in output.iterdir()} == {"front.png", "front.svg", "points.jsonl"}
    with Image.open(output / "front.png") as image:
        image.load()
        assert min(image.size) > 300
    ElementTree.parse(output / "front.svg")
    written = json.loads(report.read_text())
    assert len(written["points"]) == 1 + 4 and written["left_out"] == 0
    for point in written["points"]:
        assert point["speculative"] / point["bandwidth"] == point["per_bandwidth"]
        shown = f"{point['rows']} x {point['cols']}"
        assert not point["front"] or shown in first.out
    # What is finished is not computed again, and the result is the same.
    monkeypatch.setattr("speq.host.exploration.speed", None)
    again = speq_command(*call)
    assert again.code == 0, again.err
    assert again.out == first.out and json.loads(report.read_text()) == written


def test_processes_and_what_is_left_of_a_killed_run_give_the_same(speq_command, tmp_path: Path):
    def explored(name: str, *options: object) -> list[bytes]:
        folder, report = tmp_path / name, tmp_path / f"{name}.json"
        found = speq_command("explore", "tiny", *SWEEP, *options, "-o", folder, "--json", report)
        assert found.code == 0, found.err
        return [path.read_bytes() for path in (report, folder / "front.png", folder / "front.svg")]

    serial = explored("serial", "--jobs", 1)
    assert explored("parallel", "--jobs", 2) == serial
    (tmp_path / "killed").mkdir()
    kept = (tmp_path / "serial" / "points.jsonl").read_text()[:-20]
    (tmp_path / "killed" / "points.jsonl").write_text(kept)
    assert explored("killed", "--jobs", 1) == serial


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bandwidth", 0), "bandwidth is 0"),
        (("--bandwidth", 1, "--part", "K27"), "there is no part 'K27'; choose from Artix-7 100T"),
        (("--bandwidth", 1, "--part", "ECP5"), "units have not been measured on the family"),
        (("--bandwidth", 1, "--part", "K26", "--area", 2), "--part and --area exclude each other"),
        (("--bandwidth", 1, "--area", 0.1), "fits: the smallest, 4x8, 4 lanes, ports 64/64, takes"),
        (("--bandwidth", 1, "--part", "Art", "--rows", 16, "--cols", 64), "LUT of 57,060"),
        (("--bandwidth", 1, "--rows", 65), "rows is 65"),
        (("--bandwidth", 1, "--acceptance", 1.5), "acceptance is 1.5"),
        (("--bandwidth", 1, "--context", 513), "context is 513; that of tiny is 512"),
        (("--bandwidth", 1, "--latency", 49), "latency is 49"),
        (("--bandwidth", 1, "--scheduler", "localhost"), "scheduler is 'localhost'; expected tcp"),
    ],
)
def test_impossible_requests(speq_command, tmp_path, options, message):
    result = speq_command("explore", "tiny", *options, "-o", tmp_path / "out")
    assert result.code == 1 and not result.out
    assert len(result.err) == 1 and message in result.err[0], result.err
    assert not (tmp_path / "out").exists()


def test_parts_by_the_beginning_of_their_names():
    part = chosen_part("k26")
    assert part and part.name == "K26 (KV260)" and chosen_part(None) is None
