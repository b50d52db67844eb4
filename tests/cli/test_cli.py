# SPDX-License-Identifier: Apache-2.0
"""The command line: what commands write, and how they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
from speq.cli import benchmarks
from speq.model import encoded_file, encoding, loaders
from speq.model.checkpoint import Model, linear_names
from speq.model.encoded_file import read_encoded
from speq.model.format import encode as encode_tensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from tests.model.small_models import random_weights, small_config, write_gguf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
#: One prompt of a kind, as short as can be.
PROMPTS = {"greeting": ["hello"], "letters": ["a b"]}
QUICK = ("--max-tokens", 6, "--rows", 4, "--choices", 2)

Speq = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a random model of one block and 264 tokens."""
    config = small_config(tied_head=False, blocks=1, hidden=32, ffn_hidden=44, heads=2, kv_heads=1)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return path


@pytest.fixture
def model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The checkpoint's model, which `speq encode` finds under any name."""
    model = load_model(checkpoint)
    monkeypatch.setattr(loaders, "load_model", lambda name, **_: replace(model, name=name))
    monkeypatch.setattr("speq.cli.encode.check_model", lambda _: None)
    return model


@pytest.fixture
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


def test_help_does_not_import_the_heavy_packages() -> None:
    code = "import sys, speq.cli; print(*{'torch', 'numpy', 'amaranth'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_verilog_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    """Neither the command nor the library behind it."""
    arguments = [
        "verilog",
        "--rows",
        "1",
        "--cols",
        "4",
        "--lanes",
        "4",
        "-o",
        str(tmp_path / "x.v"),
    ]
    for work in (
        "import speq.hw.verilog",
        f"import speq.cli; speq.cli.app({arguments}, standalone_mode=False)",
    ):
        code = f"import sys; {work}; sys.exit(*sorted({{'torch', 'numpy'}} & set(sys.modules)))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "x.v").exists()


def test_installed_command_lists_its_commands() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("speq"), "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for command in ("verilog", "encode", "verify-file", "image", "generate", "eval", "bench"):
        assert f" {command} " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verilog", "-o", "x.v", "--rows", 0), "rows is 0"),
        (("verilog", "-o", "x.v", "--cols", 6), "cols is 6; the accelerator needs a power of two"),
        (("verilog", "-o", "x.v", "--cols", 8, "--data-bits", 256), "data width is 256; 8 columns"),
        (("verilog", "-o", "x.v", "--address-bits", 8), "address_bits is 8"),
        (("verilog", "-o", "x.txt"), "x.txt: name the Verilog file .v"),
        (("verilog", "-o", "x.v", "--split", 7), "split is 7"),
        (("verilog", "-o", "/dev/null/x.v", "--rows", 1, "--cols", 4), "/dev/null: "),
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


@pytest.mark.parametrize("group, split", [(64, 2), (32, 0), (128, 3)])
def test_fixed_encoding_writes_planes_and_header(
    speq_command: Speq, model: Model, tmp_path: Path, group: int, split: int
) -> None:
    path = tmp_path / "model.safetensors"
    options = ("--group", group, "--split", split, "--columns", 8)
    result = speq_command("encode", "one-block", "-o", path, "--fixed", "--verify", *options)
    assert result.code == 0, result.err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    config = FormatConfig(group, split)
    names = linear_names(model.config)
    file = read_encoded(path)
    assert (file.settings, file.report) == ({}, {})
    assert (tmp_path / file.source).resolve() == Path("one-block").resolve()
    assert list(file.tensors) == names and len(names) == 8
    stored = drafted = weights = 0
    for name, tensor in file.tensors.items():
        weight = model.linear_weight(name)
        expected = encode_tensor(weight, config, name=name, columns=8)
        for plane in ("draft_plane", "residual_plane", "group_bytes"):
            np.testing.assert_array_equal(getattr(tensor, plane), getattr(expected, plane))
        assert tensor.config == config
        stored += expected.storage_bits()
        drafted += expected.draft_bits()
        weights += weight.numel()
    assert f"{stored / weights:.4f} bits per weight" in result.out
    assert f"{stored / weights / 16 - 1:.2%} over FP16" in result.out
    assert f"{drafted / weights:.4f} bits per weight read in a draft pass" in result.out
    assert "verified: all 8 tensors decode to their original bits" in result.out


def test_fixed_encoding_selects_tensors(speq_command: Speq, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    result = speq_command("encode", "m", "-o", path, "--fixed", "--tensors", r"\.0\.(up|down)")
    assert result.code == 0, result.err
    assert list(read_encoded(path).tensors) == ["block.0.up_proj", "block.0.down_proj"]


@pytest.mark.parametrize("pattern", ["nowhere", "("])
def test_encode_refuses_a_wrong_pattern(
    speq_command: Speq, model: Model, tmp_path: Path, pattern: str
) -> None:
    result = speq_command("encode", "m", "-o", tmp_path / "x", "--fixed", "--tensors", pattern)
    assert result.code == 1
    assert len(result.err) == 1 and repr(pattern) in result.err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--split", 4), "split is 4"),
        (("--tensors", "up"), "--tensors needs --fixed"),
        (("--rows", 1), "at least 2 rows and 2 choices"),
        (("--choices", 1), "at least 2 rows and 2 choices"),
        (("--rows", 0), "rows is 0"),
        (("--group", 48), "group is 48"),
        (("--fixed", "--split", 4), "split is 4"),
        (("--prompts", "absent.json"), "absent.json"),
    ],
)
def test_encode_refuses_conflicting_options(
    speq_command: Speq, model: Model, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = speq_command("encode", "m", "-o", tmp_path / "x", *options)
    assert result.code == 1
    assert len(result.err) == 1 and message in result.err[0], result.err
    assert list(tmp_path.iterdir()) == []


def test_encode_warns_of_infinities_in_one_line(
    speq_command: Speq, model: Model, tmp_path: Path
) -> None:
    model.weights["block.0.o_proj"][3, 5] = float("inf")
    result = speq_command("encode", "m", "-o", tmp_path / "x", "--fixed", "--verify")
    assert result.code == 0, result.err
    (line,) = [line for line in result.err if "warning" in line]
    assert line.startswith("speq: warning: tensor 'block.0.o_proj'") and "[3, 5]" in line


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

    monkeypatch.setattr(encoded_file, "write_encoded", write_a_part)
    assert speq_command("encode", "m", "-o", path, "--fixed", "--force").code != 0
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert left == ({} if earlier is None else {path.name: earlier})


@pytest.mark.parametrize("plane", ["draft_plane", "residual_plane", "group_bytes"])
def test_verify_finds_one_wrong_bit(
    speq_command: Speq, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    def encode_wrongly(*arguments: object, **options: object) -> object:
        tensor = encode_tensor(*arguments, **options)
        if tensor.name == "block.0.k_proj":
            getattr(tensor, plane)[0, 0, 0] ^= 1
        return tensor

    monkeypatch.setattr(encoding, "encode", encode_wrongly)
    result = speq_command("encode", "m", "-o", tmp_path / "x", "--fixed", "--verify")
    assert result.code == 1
    assert "block.0.k_proj does not decode to its original bits" in result.err[-1]
    assert list(tmp_path.iterdir()) == []


def test_optimised_encoding_has_its_settings(
    speq_command: Speq, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    """Made twice it is the same file, with the split that was asked for."""
    path, options = tmp_path / "model.safetensors", ("--prompts", prompts, "--split", 1, *QUICK)
    result = speq_command("encode", checkpoint, "-o", path, "--verify", *options)
    assert result.code == 0, result.err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    file, model = read_encoded(path), load_model(checkpoint)
    file.check_source(model)
    file.check_bits()
    assert file.source == os.path.relpath(checkpoint, tmp_path)
    assert list(file.tensors) == linear_names(model.config)
    assert {tensor.config for tensor in file.tensors.values()} == {FormatConfig(split=1)}
    chain, alternates = file.settings["chain"], file.settings["alternates"]
    assert (chain.rows, chain.choices, alternates.rows, alternates.choices) == (4, 1, 4, 2)
    for name, value in file.report["calibration_speedup"].items():
        assert f"{name + ':':<11} modelled speedup {value:.3f}" in result.out
    best = file.report["tried"][0]
    assert best["reranked"] == chain.reranked == alternates.reranked
    head = f"drafts {best['drafted_outputs']} of 264 tokens, {chain.reranked} re-ranked"
    assert head in result.out and "verified: all 8 tensors" in result.out
    whole = path.read_bytes()
    assert speq_command("encode", checkpoint, "-o", path, *options).code == 0
    assert path.read_bytes() == whole


@pytest.fixture
def fixed_file(speq_command: Speq, checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    result = speq_command("encode", checkpoint, "-o", path, "--fixed")
    assert result.code == 0, result.err
    return path


def test_verify_file_compares_with_the_checkpoint(
    speq_command: Speq, checkpoint: Path, fixed_file: Path, tmp_path: Path
) -> None:
    for options in ((), ("--model", checkpoint)):
        result = speq_command("verify-file", fixed_file, *options)
        assert result.code == 0, result.err
        assert f"verified: all 8 tensors of {fixed_file} decode" in result.out
    config = load_model(checkpoint).config
    write_gguf(tmp_path / "other.gguf", config, random_weights(config, SEED + 1))
    result = speq_command("verify-file", fixed_file, "--model", tmp_path / "other.gguf")
    assert result.code == 1 and not result.out
    assert len(result.err) == 1 and "block.0.q_proj differs" in result.err[0]
    assert str(fixed_file) in result.err[0]
    result = speq_command("verify-file", fixed_file, "--model", "absent.gguf")
    assert result.code == 1 and "absent.gguf" in result.err[0]


def test_files_find_their_checkpoint_where_both_have_moved(
    speq_command: Speq, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever way it was named, and whatever the working directory is."""
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "models").mkdir(parents=True)
    (first / "encoded").mkdir()
    shutil.copy(checkpoint, first / "models/m.gguf")
    monkeypatch.chdir(first / "models")
    for i, name in enumerate(("m.gguf", first / "models/m.gguf", "../models/m.gguf")):
        result = speq_command("encode", name, "--fixed", "-o", f"../encoded/{i}.safetensors")
        assert result.code == 0, result.err
        content = (first / f"encoded/{i}.safetensors").read_bytes()
        assert str(tmp_path).encode() not in content
    monkeypatch.chdir(tmp_path)
    first.rename(second)
    for file in (second / "encoded").iterdir():
        assert speq_command("verify-file", file).code == 0
    assert speq_command("encode", "tiny", "--fixed", "-o", "t").code == 0
    assert read_encoded(Path("t")).source == "tiny"


@pytest.mark.parametrize("part", ["draft", "residual", "groups"])
def test_verify_file_finds_one_flipped_bit(speq_command: Speq, fixed_file: Path, part: str) -> None:
    arrays = {name: array.copy() for name, array in load_file(fixed_file).items()}
    with safe_open(fixed_file, "numpy") as file:
        metadata = file.metadata()
    arrays[f"block.0.gate_proj.{part}"][0, 0, 3] ^= 1
    save_file(arrays, fixed_file, metadata)
    result = speq_command("verify-file", fixed_file)
    assert result.code == 1
    assert len(result.err) == 1
    assert "the arrays of block.0.gate_proj differ from their digest" in result.err[0]


def test_verify_file_refuses_what_is_no_encoded_model(
    speq_command: Speq, fixed_file: Path, tmp_path: Path
) -> None:
    fixed_file.write_bytes(fixed_file.read_bytes()[:-1])
    for path, message in (
        (fixed_file, "is no intact encoded model"),
        (tmp_path / "absent", "absent"),
        (tmp_path, "directory"),
    ):
        result = speq_command("verify-file", path)
        assert result.code == 1
        assert len(result.err) == 1 and message in result.err[0], result.err
        assert str(path) in result.err[0]


ENGINE_FILES = [".core", ".json", ".v", ".vlt"]
ACCELERATOR_FILES = sorted([*ENGINE_FILES, ".h", ".md", ".rdl", "_example.v", "_tb.v"])


@pytest.mark.parametrize(
    ("options", "top", "suffixes"),
    [
        (("--engine", "--cols", 3), "speq_gemm_engine", ENGINE_FILES),
        (("--cols", 4, "--lanes", 0), "speq_top", ACCELERATOR_FILES),
        (
            (
                "--cols",
                8,
                "--weights-bits",
                64,
                "--data-bits",
                128,
                "--address-bits",
                48,
                "--lanes",
                0,
            ),
            "speq_top",
            ACCELERATOR_FILES,
        ),
    ],
)
def test_verilog_writes_all_files(
    speq_command: Speq, tmp_path: Path, options: tuple, top: str, suffixes: list[str]
) -> None:
    path = tmp_path / "some.v"
    result = speq_command("verilog", "--rows", 2, *options, "--max-k", 128, "-o", path)
    assert result.code == 0, result.err
    names = [f"some{suffix}" for suffix in suffixes]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert f"module {top}(" in path.read_text()
    description = json.loads(path.with_suffix(".json").read_text())
    assert description["top"] == top
    ports = {port["name"]: port["width"] for port in description["ports"]}
    if "--weights-bits" in options:
        assert (ports["m_axi_weights_rdata"], ports["m_axi_data_wdata"]) == (64, 128)
        assert ports["m_axi_data_awaddr"] == 48
    for name in names:
        assert name in result.out


def test_median_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Durations 100 (warm-up, not timed), then 1, 9 and 2.
    times = iter([0, 1, 10, 19, 20, 22])
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: next(times))
    calls = []
    assert benchmarks.median_seconds(lambda: calls.append(1), 3) == 2
    assert len(calls) == 4


@pytest.mark.parametrize(
    "value, at_most, met",
    [(1, True, True), (2, True, True), (3, True, False), (1, False, False), (2, False, True)],
)
def test_figure_is_compared_with_its_target(value: float, at_most: bool, met: bool) -> None:
    assert benchmarks.Figure("size", value, "MB", 2, at_most).met is met


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
        assert ("yes" if figure["met"] else "no") in row.split()


def test_samplers_are_compared_where_there_is_an_encoded_file(speq_command: Speq) -> None:
    result = speq_command("bench", "--only", "samplers")
    assert result.code == 0
    assert "samplers is skipped: it needs SmolLM2's file of speq encode" in result.out
    result = speq_command("bench", "--only", "samplers", "--encoded", "absent.safetensors")
    assert result.code == 1 and "absent.safetensors" in result.err[0]


def test_codec_bench_labels_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise benchmarks.CheckpointError("not installed")

    monkeypatch.setattr(benchmarks, "smollm2_path", absent)
    monkeypatch.setattr(benchmarks, "SMOLLM2_BLOCKS", 1)
    weights, source = benchmarks.block_weights(3)
    assert [tuple(w.shape) for w in weights] == list(benchmarks.SMOLLM2_BLOCK)
    assert "random" in source and "seed 3" in source
    again, _ = benchmarks.block_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            ["generate", "tiny", "--prompt=a", "--seed", str(2**64)],
            "less than or equal to 18446744073709551615",
        ),
        (["generate", "tiny", "--prompt=a", "--seed", "-1"], "greater than or equal to 0"),
        (
            ["generate", "tiny", "--prompt=a", "--max-tokens", "9" * 30],
            "less than or equal to 16777216",
        ),
        (["generate", "tiny", "--prompt=a", "--rows", "9" * 30], "expected 1 to 1024"),
        (["generate", "tiny", "--prompt=a", "--choices", "9" * 30], "expected 1 to 1024"),
        (["eval", "tiny", "-o", "x", "--rows", "9" * 30], "expected 1 to 1024"),
        (["eval", "tiny", "-o", "x", "--max-tokens", "9" * 30], "less than or equal to 16777216"),
        (["encode", "tiny", "-o", "x", "--rows", "9" * 30], "expected 1 to 1024"),
        (["encode", "tiny", "-o", "x", "--columns", "9" * 30], "less than or equal to 256"),
        (["demo", "--block", "-1"], "greater than or equal to 0"),
        (["cycles", "--rows", "9" * 30], "allowed are integers from 1 to 64"),
        (["cycles", "--context", "9" * 30], "expected 0 to 16777216 positions"),
        (["cycles", "--clock", "1e300"], "up to 100000 MHz"),
    ],
)
def test_numbers_that_do_not_fit(
    arguments: list[str],
    answer: str,
    speq_command: Speq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One answer that names the option and its range, before any work."""
    monkeypatch.chdir(tmp_path)
    result = speq_command(*arguments)
    assert result.code in (1, 2)
    text = " ".join(" ".join(result.err).replace("│", " ").split())
    assert answer in text
    assert arguments[-2].removeprefix("--").split("-")[0] in text
    assert not list(tmp_path.iterdir())
