# SPDX-License-Identifier: Apache-2.0
"""`speq cycles`: the tables, models of one's own, and impossible options."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from speq.cli.predict import DEFAULT_CONTEXT
from speq.host.cycles import predicted_passes
from speq.model.cycles import uniform_formats
from speq.model.encoded_file import EncodedModel, sha256, write_encoded
from speq.model.encoding import encode_linears
from speq.model.loaders import gguf_file, load_model, read_config
from speq.model.number_format import FormatConfig
from speq.model.prediction import MODELS, predict
from speq.model.speculation import Settings
from tests.model.small_models import (
    random_weights,
    small_config,
    write_gguf,
    write_hf,
    write_llama2c,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
SMOLLM2 = MODELS["SmolLM2-135M"]


def passes(config, rows=4, cols=8, formats=None, context=64, drafted=None):
    """What `speq cycles` predicts speeds from."""
    formats = formats or uniform_formats(config, FormatConfig())
    options = {"latency": 48, "context": context, "drafted_outputs": drafted}
    return predicted_passes(config, formats, rows=rows, cols=cols, **options)


def test_table(speq_command):
    result = speq_command("cycles", "--cols", 16, "--acceptance", 0.8)
    assert result.code == 0, result.err
    p = predict(passes(SMOLLM2, 8, 16, context=DEFAULT_CONTEXT), 0.8, DEFAULT_CONTEXT)
    line = next(line for line in result.out.splitlines() if "SmolLM2" in line)
    for value in (f"{p.plain / 1e6:.3f}", f"{500e6 / p.plain:.4g}", f"{p.speedup:.2f}"):
        assert value in line.split()
    assert "16 GB/s" in result.out  # 16 columns of 2 bytes at 500 MHz
    for cycles in (p.plain, p.cycles_per_token):
        assert f"{500e6 / cycles / 16:.3g}" in line.split()
    for name in MODELS:
        assert name in result.out


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The same random model in files and folders; of one only the settings."""
    config = small_config(tied_head=False, context=64)
    folder = tmp_path_factory.mktemp("models")
    weights = random_weights(config, SEED)
    write_gguf(folder / "random.gguf", config, weights)
    write_llama2c(folder / "random.bin", config, weights)
    write_hf(folder / "whole", config, weights)
    (folder / "settings").mkdir()
    settings = (folder / "whole/config.json").read_text()
    (folder / "settings/config.json").write_text(settings)
    names = ("random.gguf", "random.bin", "whole", "whole/config.json", "settings")
    return {name: folder / name for name in names}


def test_drafts_of_an_encoded_file(speq_command, checkpoints, tmp_path):
    """Its head's part of the vocabulary and its re-ranked tokens count; layers that are not in it
    are drafted in FP16."""
    model = load_model(checkpoints["random.gguf"])
    tensors = encode_linears(model, pattern="head|gate", columns=8)
    tensors["head"] = replace(tensors["head"], drafted_outputs=100)
    settings = {name: Settings(4, reranked=3) for name in ("chain", "alternates")}
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    write_encoded(tmp_path / "x", EncodedModel("m", tensors, digests, settings))
    array = ("--rows", 4, "--cols", 8, "--acceptance", 0.8)
    result = speq_command("cycles", checkpoints["settings"], "--encoded", tmp_path / "x", *array)
    assert result.code == 0, result.err
    formats = {name: tensor.config for name, tensor in tensors.items()}
    p = predict(passes(model.config, formats=formats, drafted=100), 0.8, 64, 3)
    row = result.out.splitlines()[-1].split()
    assert f"{p.draft / 1e6:.3f}" in row and f"{p.speedup:.2f}" in row
    for model_options, message in (((), "--encoded is of one model"), (("tiny",), "another model")):
        result = speq_command("cycles", *model_options, "--encoded", tmp_path / "x", *array)
        assert result.code == 1 and len(result.err) == 1 and message in result.err[0]


def test_models_of_ones_own(speq_command, checkpoints, monkeypatch):
    """Without a look at their weights."""

    def refuse(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(gguf_file.GgufTensor, "dequantize", refuse)
    monkeypatch.setattr("speq.model.loaders.hf.safetensors.safe_open", refuse)
    monkeypatch.setattr("speq.model.loaders.llama2c.np.fromfile", refuse)
    config = small_config(tied_head=False, context=64)
    p = predict(passes(config), 0.8, 64)
    for path in checkpoints.values():
        result = speq_command("cycles", path, "--rows", 4, "--cols", 8, "--acceptance", 0.8)
        assert result.code == 0, result.err
        name, array, memory, *_, row = result.out.splitlines()
        assert name == str(path)
        assert array.startswith("4 x 8 array") and memory.endswith("context 64")
        for value in (f"{p.plain / 1e6:.3f}", f"{500e6 / p.plain:,.0f}", f"{p.speedup:.2f}"):
            assert value in row.split()


def test_the_shipped_model(speq_command):
    result = speq_command("cycles", "tiny", "--context", 100)
    assert result.code == 0, result.err
    assert result.out.startswith("tiny\n") and "context 100\n" in result.out
    assert read_config("tiny").context == 512


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"num_experts": 8}, "setting num_experts = 8 is not supported"),
        ({"hidden_size": None}, "setting 'hidden_size' is missing"),
        ({"intermediate_size": 1 << 17}, "max_k is 131072; allowed are integers from 1 to 65536"),
    ],
)
def test_what_is_not_supported_is_named(speq_command, checkpoints, tmp_path, settings, message):
    path = tmp_path / "config.json"
    whole = json.loads(checkpoints["whole/config.json"].read_text())
    path.write_text(json.dumps(whole | settings))
    result = speq_command("cycles", path)
    assert result.code == 1 and len(result.err) == 1
    assert message in result.err[0] and str(path) in result.err[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--acceptance", 2), "acceptance is 2"),
        (("--clock", 0), "clock is 0"),
        (("--context", -1), "context is -1"),
        (("--context", 4097), "context is 4097; that of Llama-2-13B is 4096"),
        (("tiny", "--context", 513), "context is 513; that of tiny is 512"),
        (("absent.gguf",), "absent.gguf: No such file"),
        (("absent",), "absent: not a model: neither an alias (smollm2, tiny) nor a folder"),
        ((__file__,), "not a model: neither an alias"),
        (("--rows", 0), "rows is 0"),
        (("--cols", 128), "cols is 128: no port is as wide: data_bits is 2048"),
        (("--cols", 24), "cols is 24"),
        (("--latency", 49), "latency is 49"),
    ],
)
def test_impossible_requests(speq_command, options, message):
    result = speq_command("cycles", *options)
    assert result.code == 1 and not result.out
    assert len(result.err) == 1 and message in result.err[0]
