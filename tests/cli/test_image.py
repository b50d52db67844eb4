# SPDX-License-Identifier: Apache-2.0
"""`speq image`: the file it writes, what it says of one, and decoding from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from speq.host.accelerator_model import AcceleratorModel
from speq.host.image_file import read_image
from speq.host.session import memory_size
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.verilog.generate import ACCELERATOR_TOP, TOP
from speq.model.encoded_file import EncodedModel, sha256, write_encoded
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings
from tests.host.decoding import GUESSING
from tests.model.drafted import randomly_scaled
from tests.model.small_models import random_weights, small_config, write_gguf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
CHAIN = Settings(6, 3, 0.5, 1)
ALTERNATES = Settings(6, 4, 0.25, 3, 5, GUESSING)

Speq = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a random model of one block and 264 tokens."""
    config = small_config(tied_head=False, blocks=1, context=64)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return path


@pytest.fixture(scope="module")
def encoded(checkpoint: Path) -> Path:
    """The checkpoint in groups of 32, and settings."""
    model = load_model(checkpoint)
    tensors = randomly_scaled(model, np.random.default_rng(SEED), FormatConfig(32))
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    settings = {"chain": CHAIN, "alternates": ALTERNATES}
    path = checkpoint.with_name("model.safetensors")
    write_encoded(path, EncodedModel(str(checkpoint), tensors, digests, settings))
    return path


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[AcceleratorConfig]:
    """The functional model in place of the simulation; the configurations that were asked for."""
    configs = []

    class Simulated(AcceleratorModel):
        def cycles(self) -> int:
            return 0

    def board(model: object, tensors: object, config: object, capacity: int) -> Simulated:
        configs.append(config)
        return Simulated(config, memory_size(config, model, tensors, capacity))

    monkeypatch.setattr("speq.cli.decoding.simulated_board", board)
    return configs


def test_an_image_decodes_on_the_array_that_it_was_made_for(
    speq_command: Speq, checkpoint: Path, encoded: Path, accelerator: list, tmp_path: Path
) -> None:
    """The text is that of plain decoding, with the encoded file's settings or others."""
    path = tmp_path / "model.image"
    options = ("--rows", 6, "--cols", 8, "--max-k", 256, "--weights-bits", 64)
    made = speq_command("image", checkpoint, "--encoded", encoded, *options, "-o", path)
    assert made.code == 0, made.err
    assert f"written:  {path}, " in made.out and "KV cache: 70 entries" in made.out
    settings = read_image(path).settings
    assert settings == ALTERNATES
    common = ("generate", checkpoint, "--prompt", "hello", "--max-tokens", 12)
    plain = speq_command(*common, "--mode", "fp16").out
    rtl = (*common, "--backend", "rtl", "--image", path)
    assert speq_command(*rtl).out == plain
    assert speq_command(*rtl, "--choices", 2, "--reranked", 0, "--draft-length", 2).out == plain
    told = json.loads(speq_command(*rtl, "--json", "--draft-length", 2).out)
    assert told["text"] + "\n" == plain and told["settings"]["image"] == str(path)
    assert told["settings"]["array"] == {"rows": 6, "cols": 8, "lanes": 8}
    assert told["settings"]["draft_length"] == 2 and told["settings"]["reranked"] == 5
    (config,) = set(accelerator)
    assert (config.engine.rows, config.engine.cols, config.engine.max_k) == (6, 8, 256)
    assert config.engine.format == FormatConfig(32) and config.weights.data_bits == 64


def test_configurations_from_descriptions_and_presets(
    speq_command: Speq, checkpoint: Path, tmp_path: Path
) -> None:
    """Of an accelerator without a history nothing is guessed; an engine's description is none."""
    path = tmp_path / "model.image"
    made = speq_command("image", checkpoint, "--preset", "small", "--history", 0, "-o", path)
    assert made.code == 0, made.err
    image = read_image(path)
    assert image.config == AcceleratorConfig(EngineConfig(rows=4, cols=8), history=0)
    assert not image.settings.policy.guesses
    engine = tmp_path / "engine.json"
    config = EngineConfig(rows=1, cols=4, max_k=64)
    derived = ("accumulator_bits", "accumulator_unit_exponent")
    parameters = asdict(config) | {name: getattr(config, name) for name in derived}
    engine.write_text(json.dumps({"top": TOP, "parameters": parameters}))
    made = speq_command("image", checkpoint, "--config", engine, "-o", path)
    assert made.code == 1
    assert made.err == [
        "speq: error: --config is of a matrix engine alone: give one of an accelerator"
    ]


def test_an_image_is_described(
    speq_command: Speq, checkpoint: Path, encoded: Path, tmp_path: Path
) -> None:
    """Every region with its size, sums, and what the image is for."""
    path = tmp_path / "model.image"
    speq_command("image", checkpoint, "--encoded", encoded, "--context", 20, "-o", path)
    made = speq_command("image", "--info", path)
    assert made.code == 0, made.err
    image = read_image(path)
    rows = [line.split() for line in made.out.splitlines()]
    for part in image.parts:
        numbers = [f"{part.start:#x}", f"{part.size:,}"]
        # What holds something before the first run is in the file, what is in the window on chip.
        inside = image.scratch.start <= part.start < image.scratch.stop
        assert not (inside and part.kind.is_given)
        numbers += ["yes"] if inside or part.kind.is_given else []
        assert any(row[-len(numbers) :] == numbers and part.name in [*row, ""] for row in rows)
    for text in (
        f"model:       {image.name}, 264 tokens, 64 positions",
        f"weights:     SHA-256 {load_model(checkpoint).digest.hex()}",
        "accelerator: 8 x 16, 1 drafting, K up to 2048, O up to 1048575, group 32, split 2,",
        f"memory:      {image.size:,} bytes from any multiple of 4096 on",
        "             524,288 bytes of scratch memory",
        "KV cache:    28 entries",
        "speculation: draft length 7, chains end below 0%, 3 choices, 5 re-ranked",
        f"file:        {path.stat().st_size:,} bytes, all checksums right",
    ):
        assert text in made.out, text
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    made = speq_command("image", "--info", path)
    assert made.code == 1 and made.out == ""
    (line,) = made.err
    assert line.startswith(f"speq: error: {path}: the program of move is damaged")


def test_images_say_which_vector_unit_they_are_for(
    speq_command: Speq, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.image"
    options = ("--rows", 4, "--cols", 8, "--lanes", 8, "--query-heads", 16)
    assert speq_command("image", checkpoint, *options, "-o", path).code == 0
    config = read_image(path).config
    assert (config.lanes, config.query_heads) == (8, 16)
    made = speq_command("image", "--info", path)
    assert "             a vector unit of 8 lanes for up to 16 query heads\n" in made.out
    lines = [line.split() for line in made.out.splitlines()]
    assert any(line[:3] == ["channel", "vector", "final_norm"] for line in lines)
    none = speq_command("image", checkpoint, "--lanes", 0, "-o", tmp_path / "none.image")
    assert none.code == 1 and none.err[0].startswith("speq: error: lanes is 0; only an accelerator")


def test_what_is_refused(
    speq_command: Speq,
    checkpoint: Path,
    encoded: Path,
    accelerator: list,
    tmp_path: Path,
) -> None:
    """By name, with nothing written; before the model is loaded where options alone are wrong."""
    path, other = tmp_path / "model.image", tmp_path / "other.image"
    image = ("image", checkpoint)
    for arguments, message in (
        ((*image, "--info", other), "--info is of a file alone: leave out the model"),
        (("image", "--info", other, "--rows", 4), "--rows is not used with --info"),
        (("image", "absent.gguf", "-o", path, "--rows", 65), "rows is 65; allowed are"),
        (("image", "absent.gguf", "-o", path), "absent.gguf"),
        ((*image, "-o", path, "--preset", "huge"), "there is no preset 'huge'"),
        (
            (*image, "-o", path, "--encoded", encoded, "--group", 64),
            "--group and --encoded exclude",
        ),
        ((*image, "-o", path, "--max-k", 32), "the accelerator's largest K is 32"),
        (
            (*image, "-o", path, "--encoded", encoded, "--config", description(tmp_path)),
            "has group 32 and split 2, which the accelerator cannot read",
        ),
    ):
        made = speq_command(*arguments)
        assert made.code == 1 and message in made.err[-1], made.err
        assert len(made.err) == 1 and not path.exists()
    assert speq_command("image", checkpoint).code == speq_command("image").code == 2
    other.write_text("not an image")
    made = speq_command(*image, "-o", other)
    assert made.code == 1 and "a file that this command did not write" in made.err[-1]
    assert other.read_text() == "not an image"
    assert speq_command(*image, "--cols", 8, "--context", 12, "-o", path).code == 0
    generate = ("generate", checkpoint, "--prompt", "hello", "--image", path)
    for arguments, message in (
        (generate, "--image is for the simulated accelerator: give --backend rtl"),
        ((*generate, "--backend", "rtl", "--cols", 8), "--cols is not used with --image"),
        ((*generate, "--backend", "rtl", "--rows", 8), "--rows is not used with --image"),
        ((*generate, "--backend", "rtl", "--mode", "fp16"), "--image is not used with --mode"),
        ((*generate, "--backend", "rtl"), "entries; this one has 20: make the image with"),
        (("generate", "tiny", *generate[2:], "--backend", "rtl"), "whose weights are not those"),
    ):
        made = speq_command(*arguments)
        assert made.code == 1 and message in made.err[-1], made.err
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    made = speq_command(*generate, "--backend", "rtl", "--max-tokens", 2)
    assert made.code == 1 and "the program of move is damaged" in made.err[-1]
    assert accelerator == []


def description(folder: Path) -> Path:
    """Of an accelerator with groups of 64, without what is not needed of one."""
    path = folder / "speq_top.json"
    config = AcceleratorConfig(EngineConfig(rows=1, cols=4))
    path.write_text(json.dumps({"top": ACCELERATOR_TOP, "parameters": asdict(config)}))
    return path
