# SPDX-License-Identifier: Apache-2.0
"""`speq verilog`: configurations from descriptions, presets and options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from speq.cli.presets import PRESETS
from speq.cli.verilog import configuration
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog import generate

SMALL = (
    *("--rows", 1, "--cols", 4, "--max-k", 64, "--group", 32, "--split", 1),
    *("--lanes", 0, "--address-bits", 33),
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [SMALL, ("--engine", *SMALL[:-4])], ids=["whole", "engine"])
def test_a_description_makes_the_same_bytes(speq_command, tmp_path, options):
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
    written = speq_command("verilog", *options, "-o", tmp_path / "first/x.v")
    assert written.code == 0, written.err
    description = tmp_path / "first/x.json"
    again = speq_command("verilog", "--config", description, "-o", tmp_path / "again/x.v")
    assert again.code == 0, again.err
    assert contents(tmp_path / "again") == contents(tmp_path / "first")


@pytest.fixture
def asked_for(monkeypatch) -> list:
    """The configurations for which Verilog was to be written."""
    configs = []

    def write(config: object, path: Path, *, force: bool) -> tuple[Path, ...]:
        configs.append(config)
        return ()

    monkeypatch.setattr("speq.hw.verilog.write_verilog", write)
    return configs


@pytest.fixture(scope="module")
def description(tmp_path_factory) -> tuple[AcceleratorConfig, Path]:
    """A description, but for what is not read of it, of ports and buffers that are not usual."""
    port = AxiConfig(data_bits=64, address_bits=33, burst=8, outstanding=4, depth=32)
    config = AcceleratorConfig(EngineConfig(rows=2, cols=8, max_o=99), port, port)
    path = tmp_path_factory.mktemp("description") / "x.json"
    content = {"top": generate.ACCELERATOR_TOP, "parameters": generate.asdict(config)}
    path.write_text(json.dumps(content))
    return config, path


def test_options_override_a_description(speq_command, asked_for, description):
    config, path = description
    for options in (
        (),
        ("--rows", 4, "--split", 0, "--data-bits", 128, "--address-bits", 40),
        ("--engine",),
    ):
        made = speq_command("verilog", "--config", path, *options, "-o", "x.v")
        assert made.code == 0, made.err
    same, other, engine = asked_for
    assert same == config and engine == config.engine
    assert (other.engine.rows, other.engine.cols, other.engine.max_o) == (4, 8, 99)
    assert other.engine.format.split == 0
    assert (other.weights.data_bits, other.data.data_bits) == (64, 128)
    assert other.address_bits == 40 and other.weights.burst == other.data.burst == 8


@pytest.mark.parametrize("name", PRESETS)
def test_presets(speq_command, asked_for, name):
    made = speq_command("verilog", "--preset", name, "-o", "x.v")
    assert made.code == 0, made.err
    (config,) = asked_for
    for option, value in PRESETS[name].options.items():
        assert getattr(config.engine, option) == value
    # What it is for begins with its size and the ports that follow from it.
    size = f"{config.engine.rows} x {config.engine.cols}, {config.weights.data_bits}-bit ports: "
    assert PRESETS[name].purpose.startswith(size)


def test_the_default_preset_is_what_no_option_gives(speq_command, asked_for):
    for options in ((), ("--preset", "default"), ("--preset", "wide", "--cols", 16, "--rows", 3)):
        assert speq_command("verilog", *options, "-o", "x.v").code == 0
    usual, default, changed = asked_for
    assert usual == default == AcceleratorConfig()
    assert (changed.engine.rows, changed.data.data_bits, changed.engine.max_k) == (3, 256, 16_384)


def test_help_lists_the_presets(speq_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = speq_command("verilog", "--help").out
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.purpose}." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "huge"), "no preset 'huge'; choose one of small, default"),
        (("--preset", "wide", "--config", "x.json"), "--config and --preset exclude each other"),
        (("--config", "absent.json"), "absent.json: No such file"),
        (("--config", "/dev/zero"), "/dev/zero: not a regular file"),
        (("--config", "binary"), "binary: it is not JSON: not UTF-8"),
        (("--config", "foreign.json"), "foreign.json: it has no field top"),
        (("--config", "x.json", "--data-bits", 256), "the data port's data width is 256"),
        (("--config", "x.json", "--rows", 0), "rows is 0"),
        (("--config", "x.json", "--engine", "--data-bits", 64), "--data-bits is not used with an"),
    ],
)
def test_what_is_refused(speq_command, description, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_bytes(description[1].read_bytes())
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    (tmp_path / "foreign.json").write_text('{"name": "speq"}')
    before = contents(tmp_path)
    result = speq_command("verilog", *options, "-o", "x.v")
    assert result.code == 1 and len(result.err) == 1
    assert message in result.err[0]
    assert contents(tmp_path) == before


def test_an_engine_stays_one():
    engine = EngineConfig(rows=2, cols=3)
    assert configuration(engine, False, {"rows": 4}) == EngineConfig(rows=4, cols=3)
    with pytest.raises(ValueError, match="--address-bits is not used"):
        configuration(engine, False, {"address_bits": 40})


def test_the_history_is_kept_and_changed():
    assert configuration(None, False, {}).history == 2048
    none = configuration(None, False, {"history": 0})
    assert none.history == 0
    assert configuration(none, False, {"rows": 4}) == replace(none, engine=EngineConfig(rows=4))
    assert configuration(none, False, {"history": 8}).history == 8
    for size in (-8, 1, 4, 12, 1 << 17):
        with pytest.raises(ValueError, match=f"history is {size}; expected 0 .none. or a power"):
            configuration(none, False, {"history": size})
    with pytest.raises(ValueError, match="--history is not used"):
        configuration(EngineConfig(), False, {"history": 8})


def test_the_noise_is_kept_and_changed():
    """A tile of 8 rows and 16 columns, or a row in a quarter of the time, needs 128 values."""
    made = {}
    for inputs in (32, 64, 128, 512, 4096):
        config = configuration(None, False, {"head_inputs": inputs})
        assert configuration(config, False, {"choices": 4}).head_inputs == inputs
        assert config.noise_lanes * config.noise_rounds / 5 * inputs >= 128
        made[inputs] = (config.noise_lanes, config.noise_rounds)
    assert made == {32: (4, 5), 64: (2, 5), 128: (1, 5), 512: (1, 2), 4096: (1, 1)}
    assert configuration(None, False, {}).head_inputs == 512
    for inputs in (16, 100, 8192):
        with pytest.raises(ValueError, match=f"head_inputs is {inputs}; allowed are powers of two"):
            configuration(None, False, {"head_inputs": inputs})
    with pytest.raises(ValueError, match="--head-inputs is not used"):
        configuration(EngineConfig(), False, {"head_inputs": 64})


def test_the_vector_unit_is_kept_and_changed():
    assert configuration(None, False, {}).lanes == 8
    assert configuration(None, False, {"rows": 4, "cols": 4}).lanes == 4
    with pytest.raises(ValueError, match=r"needs at least as many columns \(4\), or take lanes 0"):
        configuration(None, False, {"cols": 4})
    assert configuration(None, False, {"cols": 4, "lanes": 0}).engine.cols == 4
    some = configuration(None, False, {"lanes": 8, "query_heads": 32})
    assert (some.lanes, some.query_heads) == (8, 32)
    assert configuration(some, False, {"rows": 4}) == replace(some, engine=EngineConfig(rows=4))
    assert configuration(some, False, {"lanes": 0}) == replace(some, lanes=0)
    for lanes in (-4, 2, 12, 32):
        with pytest.raises(ValueError, match=f"lanes is {lanes}; allowed are powers of two"):
            configuration(some, False, {"lanes": lanes})
    with pytest.raises(ValueError, match="query_heads is 2048; allowed are powers of two"):
        configuration(some, False, {"query_heads": 2048})
    with pytest.raises(ValueError, match="--query-heads is not used"):
        configuration(EngineConfig(), False, {"query_heads": 8})


def test_the_length_of_a_ranking_is_kept_and_changed():
    assert configuration(None, False, {}).choices == 8
    four = configuration(None, False, {"choices": 4})
    assert four.choices == 4
    assert configuration(four, False, {"rows": 4}) == replace(four, engine=EngineConfig(rows=4))
    assert configuration(four, False, {"choices": 8}).choices == 8
    with pytest.raises(ValueError, match="choices is 5; expected 4 or 8"):
        configuration(four, False, {"choices": 5})
    with pytest.raises(ValueError, match="--choices is not used"):
        configuration(EngineConfig(), False, {"choices": 4})
