# SPDX-License-Identifier: Apache-2.0
"""The command line: what commands write, and how they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import speq.cli
from speq.cli import bench, encode
from speq.model.checkpoint import LINEARS, Model, linear_names
from speq.model.format import FormatConfig
from speq.model.format import encode as encode_tensor

SEED = int(os.environ.get("SPEQ_SEED", "0"))
SHAPES = dict(
    zip(
        LINEARS,
        [(44, 44), (20, 44), (20, 44), (44, 44), (172, 44), (172, 44), (44, 172)],
        strict=True,
    )
)

Speq = Callable[..., SimpleNamespace]


@pytest.fixture
def speq_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Speq:
    """Call `speq` with arguments: exit code, standard output, lines of standard error."""
    # main() replaces this; the fixture puts it back.
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delenv("SPEQ_DEBUG", raising=False)

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["speq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            speq.cli.main()
        captured = capsys.readouterr()
        return SimpleNamespace(
            code=stop.value.code or 0, out=captured.out, err=captured.err.splitlines()
        )

    return call


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model of two blocks with random weights that `speq encode` finds under any name."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {
        f"block.{i}.{linear}": torch.randn(shape, generator=generator).half()
        for i in range(2)
        for linear, shape in SHAPES.items()
    }
    # Only the number of blocks matters for the names of the linear layers.
    model = Model("two-blocks", SimpleNamespace(blocks=2), weights, tokenizer=None)
    monkeypatch.setattr(encode, "load_model", lambda name: replace(model, name=name))
    return model


def test_help_does_not_import_the_heavy_packages() -> None:
    code = "import sys, speq.cli; print(*{'torch', 'numpy', 'amaranth'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_installed_command_lists_its_commands() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("speq"), "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for command in ("verilog", "encode", "demo", "bench"):
        assert f" {command} " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verilog", "-o", "x.v", "--rows", 0), "rows is 0"),
        (("verilog", "-o", "x.v", "--width", 7), "draft width is 7"),
        (("verilog", "-o", "/dev/null/x.v", "--rows", 1, "--cols", 1), "/dev/null: "),
        (("encode", "absent.gguf", "-o", "x.safetensors"), "absent.gguf"),
        (("encode", "absent.gguf", "-o", "absent/x.safetensors"), "absent: no such folder"),
        (("encode", "absent.gguf", "-o", "."), "directory"),
        (("encode", "absent.gguf", "-o", "x", "--group", 48), "group is 48"),
        (("bench", "--only", "nothing"), "no benchmark 'nothing'"),
    ],
)
def test_expected_errors_are_one_line(
    speq_command: Speq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = speq_command(*arguments)
    assert result.code == 1
    assert len(result.err) == 1, result.err
    assert result.err[0].startswith("speq: error: ")
    assert message in result.err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("verilog",),
        ("encode", "smollm2"),
        ("encode", "smollm2", "-o", "x", "--columns", "0"),
        ("verilog", "-o", "x.v", "--rows", "many"),
        ("nonsense",),
    ],
)
def test_usage_errors_exit_with_2(speq_command: Speq, arguments: tuple[str, ...]) -> None:
    result = speq_command(*arguments)
    assert result.code == 2
    assert any("Usage:" in line for line in result.err)


def test_debug_shows_the_traceback(speq_command: Speq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEQ_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["speq", "bench", "--only", "nothing"])
    with pytest.raises(ValueError, match="nothing"):
        speq.cli.main()


def test_error_text_has_no_line_breaks() -> None:
    assert speq.cli.describe(ValueError("one\n  two")) == "one two"
    assert speq.cli.describe(ValueError()) == "ValueError"
    assert speq.cli.describe(FileNotFoundError(2, "No such file", "a.bin")) == "a.bin: No such file"


@pytest.mark.parametrize("group, split, width", [(64, 2, 4), (32, 0, 5), (128, 3, 6)])
def test_encode_writes_planes_and_header(
    speq_command: Speq, model: Model, tmp_path: Path, group: int, split: int, width: int
) -> None:
    path = tmp_path / "model.safetensors"
    options = ("--group", group, "--split", split, "--width", width, "--columns", 8)
    result = speq_command("encode", "two-blocks", "-o", path, "--verify", *options)
    assert result.code == 0, result.err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    config = FormatConfig(group, split, width)
    arrays = load_file(path)
    bits = 0
    for name, weight in model.weights.items():
        expected = encode_tensor(weight, config, name=name, columns=8)
        bits += expected.storage_bits()
        np.testing.assert_array_equal(arrays.pop(f"{name}.draft"), expected.draft_plane)
        np.testing.assert_array_equal(arrays.pop(f"{name}.residual"), expected.residual_plane)
        np.testing.assert_array_equal(arrays.pop(f"{name}.groups"), expected.group_bytes)
    assert arrays == {}

    header, tensors = encode.read_encoded(path)
    assert header["source"] == "two-blocks"
    assert header["format"] == {"group": group, "split": split, "width": width}
    assert header["columns"] == 8
    decoded = {tensor.name: tensor.decode() for tensor in tensors}
    assert list(decoded) == linear_names(model.config)[:-1] == list(header["tensors"])
    for name, weight in model.weights.items():
        assert torch.equal(decoded[name].view(torch.int16), weight.view(torch.int16)), name

    weights = sum(weight.numel() for weight in model.weights.values())
    assert f"{bits / weights:.4f} bits per weight" in result.out
    assert f"{bits / weights / 16 - 1:.2%} over FP16" in result.out
    assert "M weights/s" in result.out
    assert "verified: 14 of 14 tensors" in result.out


def test_encode_selects_tensors(speq_command: Speq, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    pattern = r"\.1\.(up|down)"
    assert speq_command("encode", "m", "-o", path, "--tensors", pattern).code == 0
    assert list(encode.read_encoded(path)[0]["tensors"]) == ["block.1.up_proj", "block.1.down_proj"]


@pytest.mark.parametrize("pattern", ["nowhere", "("])
def test_encode_refuses_a_wrong_pattern(
    speq_command: Speq, model: Model, tmp_path: Path, pattern: str
) -> None:
    result = speq_command("encode", "m", "-o", tmp_path / "x", "--tensors", pattern)
    assert result.code == 1
    assert len(result.err) == 1 and repr(pattern) in result.err[0]
    assert list(tmp_path.iterdir()) == []


def test_encode_warns_of_infinities_in_one_line(
    speq_command: Speq, model: Model, tmp_path: Path
) -> None:
    model.weights["block.1.o_proj"][3, 5] = float("inf")
    result = speq_command("encode", "m", "-o", tmp_path / "x", "--verify")
    assert result.code == 0, result.err
    (line,) = [line for line in result.err if "warning" in line]
    assert line.startswith("speq: warning: tensor 'block.1.o_proj'") and "[3, 5]" in line


@pytest.mark.parametrize("earlier", [None, b"an earlier file"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_encode_leaves_nothing_behind(
    speq_command: Speq,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    earlier: bytes | None,
) -> None:
    path = tmp_path / "model.safetensors"
    if earlier is not None:
        path.write_bytes(earlier)

    def write_a_part(file: Path, *_: object) -> None:
        file.write_bytes(b"part")
        raise failure

    monkeypatch.setattr(encode, "write_encoded", write_a_part)
    assert speq_command("encode", "m", "-o", path).code != 0
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert left == ({} if earlier is None else {path.name: earlier})


@pytest.mark.parametrize("plane", ["draft_plane", "residual_plane", "group_bytes"])
def test_verify_finds_one_wrong_bit(
    speq_command: Speq, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    def encode_wrongly(*arguments: object, **options: object) -> object:
        tensor = encode_tensor(*arguments, **options)
        if tensor.name == "block.1.k_proj":
            getattr(tensor, plane)[0, 0, 0] ^= 1
        return tensor

    monkeypatch.setattr(encode, "encode_tensor", encode_wrongly)
    result = speq_command("encode", "m", "-o", tmp_path / "x", "--verify")
    assert result.code == 1
    assert "block.1.k_proj does not decode to its original bits" in result.err[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "foreign", "version", "columns", "shape", "plane"])
def test_damaged_file_is_a_value_error(
    speq_command: Speq, model: Model, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "model.safetensors"
    assert speq_command("encode", "m", "-o", path).code == 0
    assert encode.check_encoded(path) == 14
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        arrays = load_file(path)
        with safe_open(path, "numpy") as file:
            header = json.loads(file.metadata()["speq"])
        if damage == "version":
            header["version"] = 2
        elif damage == "columns":
            header["columns"] = 0
        elif damage == "shape":
            header["tensors"]["block.0.q_proj"]["shape"] = [44, 999]
        elif damage == "plane":
            del arrays["block.0.q_proj.draft"]
        metadata = None if damage == "foreign" else {"speq": json.dumps(header)}
        save_file(arrays, path, metadata)
    with pytest.raises(ValueError, match="no intact encoded model"):
        encode.check_encoded(path)


def test_verilog_writes_both_files(speq_command: Speq, tmp_path: Path) -> None:
    path = tmp_path / "engine.v"
    result = speq_command("verilog", "--rows", 2, "--cols", 3, "--max-k", 128, "-o", path)
    assert result.code == 0, result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine.json", "engine.v"]
    assert "module " in path.read_text()
    assert json.loads(path.with_suffix(".json").read_text())
    assert "engine.v" in result.out and "engine.json" in result.out


def test_median_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Durations 100 (warm-up, not timed), then 1, 9 and 2.
    times = iter([0, 1, 10, 19, 20, 22])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    calls = []
    assert bench.median_seconds(lambda: calls.append(1), 3) == 2
    assert len(calls) == 4


@pytest.mark.parametrize(
    "value, at_most, met",
    [(1, True, True), (2, True, True), (3, True, False), (1, False, False), (2, False, True)],
)
def test_figure_is_compared_with_its_target(value: float, at_most: bool, met: bool) -> None:
    assert bench.Figure("size", value, "MB", 2, at_most).met is met


def test_bench_prints_and_stores_the_figures(
    speq_command: Speq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "bench.json"
    result = speq_command("bench", "--only", "verify", "--json", path, "--seed", 7)
    assert result.code == 0, result.err
    report = json.loads(path.read_text())
    assert report["seed"] == 7
    assert report["machine"]["cores"] >= 1
    assert [f["name"] for f in report["figures"]] == ["verify_gemm, T = 1", "verify_gemm, T = 8"]
    for figure in report["figures"]:
        assert figure["value"] > 0
        assert figure["met"] == (figure["value"] >= figure["target"])
        (row,) = [line for line in result.out.splitlines() if figure["name"] in line]
        assert f"{figure['value']:,.4g}" in row
        assert ("yes" if figure["met"] else "no") in row


def test_codec_bench_labels_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise bench.CheckpointError("not installed")

    monkeypatch.setattr(bench, "smollm2_path", absent)
    monkeypatch.setattr(bench, "SMOLLM2_BLOCKS", 1)
    weights, source = bench.block_weights(3)
    assert [tuple(w.shape) for w in weights] == list(bench.SMOLLM2_BLOCK)
    assert "random" in source and "seed 3" in source
    again, _ = bench.block_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
