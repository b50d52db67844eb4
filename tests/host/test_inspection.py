# SPDX-License-Identifier: Apache-2.0
"""What is said of a model without computing: figures, limits, problems, and how much is read."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speq.host.cycles import predicted_passes
from speq.host.driver import Driver
from speq.host.inspection import Limit, report
from speq.host.session import memory_size
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.model.checkpoint import ARCHITECTURES, CheckpointError, linear_shapes, tensor_shapes
from speq.model.cycles import uniform_formats
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.loaders.hf import stored_name
from speq.model.prediction import MODELS, predict
from speq.model.transformer import KVCache
from tests.model.small_models import (
    byte_level_tokenizer,
    hf_settings,
    random_weights,
    small_config,
    write_gguf,
    write_hf,
    write_llama2c,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small Llama in FP32."""
    config = small_config()
    write_hf(tmp_path / "model", config, random_weights(config, SEED), torch.float32)
    return tmp_path / "model"


def change(folder: Path, **settings: object) -> None:
    """Change settings of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# Figures.


def test_figures_are_those_of_the_loaded_and_encoded_model() -> None:
    model = load_model("tiny")
    encoded = encode_linears(model)
    found = report("tiny", context=100)
    assert found.supported and found.fits and not found.problems and not found.notes
    assert found.sizes["context"] == model.config.context
    assert found.parameters == sum(weight.numel() for weight in model.weights.values())
    assert found.stored == {"F16": found.parameters}
    b = found.bytes
    assert b.fp16 == sum(weight.nbytes for weight in model.weights.values())
    assert b.linear == 2 * sum(o * k for o, k in linear_shapes(model.config).values())
    planes = [(t.draft_plane.nbytes, t.group_bytes.nbytes) for t in encoded.values()]
    assert b.draft == sum(draft for draft, _ in planes)
    residual = sum(t.residual_plane.nbytes for t in encoded.values())
    assert b.overhead == sum(map(sum, planes)) + residual - b.linear
    cache = KVCache(model.config, 1)
    assert b.kv_position == sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert b.kv_context == 512 * b.kv_position
    assert b.accelerator == memory_size(AcceleratorConfig(), model, encoded, 108)
    assert found.text.tokens == 512 and found.text.ends == ["<|end|>"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_in_memory_and_its_file_are_told_the_same(tmp_path, architecture) -> None:
    """For every architecture, in lines that a terminal shows."""
    config = small_config(architecture)
    write_hf(tmp_path / "model", config, random_weights(config, SEED), torch.float16)
    of_file, of_model = report(tmp_path / "model"), report(load_model(tmp_path / "model"))
    assert of_file.supported and of_file.fits
    for name, value in of_model.to_dict().items():
        if name not in ("container", "stored_bytes", "stored", "architecture"):
            assert of_file.to_dict()[name] == value, name
    assert of_model.stored_bytes == of_model.bytes.fp16 <= of_file.stored_bytes
    text = str(of_file)
    assert max(map(len, text.split("\n"))) <= 80
    assert json.loads(json.dumps(of_file.to_dict(), allow_nan=False)) == of_file.to_dict()
    expected = {
        "gemma3": "sliding window of 6 in 2 blocks, rotary base 10000 there",
        "qwen2": "biases of q, k, v",
        "qwen3": "norms of queries and keys",
        "smollm3": "1 blocks without rotary embedding",
        "granite": "factors: embedding 6, residual 0.22, logit 1.25",
    }
    assert expected.get(architecture, "2 query heads share a KV head") in of_file.traits


def test_other_files(tmp_path) -> None:
    config = small_config(tied_head=False)
    write_gguf(tmp_path / "model.gguf", config, random_weights(config, SEED))
    found = report(tmp_path / "model.gguf")
    assert found.supported and found.container == "GGUF file"
    assert found.stored == {"F32": found.parameters}
    pieces = small_config(vocab_size=291)
    write_llama2c(tmp_path / "model.bin", pieces, random_weights(pieces, SEED), 1)
    found = report(tmp_path / "model.bin")
    assert found.supported and found.text.begins == ["<s>"]
    with (tmp_path / "model.bin").open("ab") as file:
        file.write(b"x")
    (tmp_path / "tokenizer.bin").unlink()
    wrong = report(tmp_path / "model.bin")
    assert not wrong.supported and wrong.text is None and wrong.speed == found.speed
    assert ["its header implies" in wrong.problems[0], "No such file" in wrong.problems[1]] == [
        True,
        True,
    ]


def test_speed_is_the_prediction(folder) -> None:
    config = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=256))
    found = report(folder, config, context=64, clock=200.0, acceptance=0.6, latency=20).speed
    model = small_config()
    formats = uniform_formats(model, config.engine.format)
    passes = predicted_passes(model, formats, rows=4, cols=8, latency=20, context=64)
    expected = predict(passes, 0.6, 64)
    assert (found.plain, found.draft, found.verify) == (
        expected.plain,
        expected.draft,
        expected.verify,
    )
    assert found.length == expected.length and found.speedup == expected.speedup
    assert found.rate == pytest.approx(200e6 / expected.cycles_per_token)
    for options, message in (
        ({"clock": 0.0}, "clock is 0.0"),
        ({"clock": math.inf}, "clock is inf"),
        ({"acceptance": 1.5}, "acceptance is 1.5; expected a probability"),
        ({"context": 0}, "context is 0; expected at least 1"),
        ({"latency": 0}, "latency is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            report(folder, **options)


# What limits it.


def test_remedies_help(folder) -> None:
    """What does not fit is what a driver refuses, and with all remedies it fits."""
    change(folder, max_position_embeddings=4096)
    config = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=80, max_o=200))
    found = report(folder, config, context=300)
    assert found.supported and not found.fits and found.bytes.accelerator is None
    assert found.longest == 76
    assert found.limits == [
        Limit("FFN size", 96, 80, "--max-k 128"),
        Limit("KV cache", 304, 80, "--max-k 512, or --context 76"),
        Limit("KV cache", 304, 200, "max_o of EngineConfig: at least 304"),
        Limit("vocabulary", 264, 200, "max_o of EngineConfig: at least 264"),
    ]
    with pytest.raises(ValueError, match="the FFN size is 96; the accelerator's largest K is 80"):
        Driver(board_of(config), load_model(folder), capacity=304)
    fitting = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=512, max_o=304))
    assert report(folder, fitting, context=300).fits
    shorter = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=128, max_o=264))
    assert report(folder, shorter, context=76).fits
    assert report(folder, fitting, context=5000).limits[0] == Limit(
        "context", 5000, 4096, "a shorter --context: the model was made for no more"
    )


def test_a_vector_unit_has_a_limit_of_its_own(folder) -> None:
    config = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=512), lanes=8, query_heads=4)
    found = report(folder, config)
    assert found.fits and found.host == ["tokenizer"]
    assert "vector unit   embedding; RMSNorm" in str(found)
    change(folder, num_attention_heads=8, num_key_value_heads=2)
    few = report(folder, config)
    limit = Limit("number of query heads", 8, 4, "query_heads of AcceleratorConfig: 8")
    assert few.limits == [limit] and not few.fits
    assert not report(folder, replace(config, query_heads=8)).limits


def board_of(config: AcceleratorConfig) -> object:
    """The functional model of an accelerator."""
    from speq.host.accelerator_model import AcceleratorModel

    return AcceleratorModel(config, 1 << 20)


def test_sizes_beyond_any_accelerator_have_no_remedy(folder) -> None:
    (folder / "config.json").write_text(
        json.dumps(hf_settings(replace(small_config(), ffn_hidden=1 << 17)))
    )
    (limit,) = report(folder).limits
    assert limit == Limit("FFN size", 1 << 17, 2048, "none: no accelerator has a max_k above 65536")


# What keeps it from being loaded.


def test_every_problem_is_named(folder) -> None:
    """Settings, tensors and files, where `load_model` says the first."""
    change(
        folder,
        attn_logit_softcapping=30.0,
        quantization_config={"bits": 4},
        hidden_act="gelu",
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
        architectures=["LlamaModel"],
        num_attention_heads=3,
    )
    (folder / "tokenizer.json").unlink()
    found = report(folder)
    assert not found.supported and not found.fits and found.bytes is found.speed is None
    patterns = (
        "attn_logit_softcapping = 30.0 is not supported",
        "quantization_config = {'bits': 4} is not supported",
        "architectures = ['LlamaModel'] is not supported",
        "hidden_act = 'gelu' is not supported, only silu",
        "RoPE scaling 'yarn' is not supported",
        "3 heads do not divide into 2 KV heads",
        "tokenizer.json: No such file",
    )
    assert len(found.problems) == len(patterns)
    for pattern in patterns:
        assert sum(pattern in problem for problem in found.problems) == 1, pattern
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(caught.value).removeprefix(f"{folder}: ") in found.problems
    assert found.sizes["hidden"] == 64 and found.parameters == sum(
        math.prod(shape) for _, shape in tensor_shapes(small_config())
    )


def test_tensors_that_are_wrong_are_named(folder) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"], tensors["model.layers.1.input_layernorm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.float64)
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(5, 64)
    tensors["model.\x1b[31mred"] = torch.zeros(1)
    save_file(tensors, file)
    found = report(folder)
    assert not found.supported and found.speed is not None
    assert found.problems == [
        "tensor 'model.layers.1.input_layernorm.weight' is missing (and 1 more)",
        "tensor 'model.layers.0.mlp.gate_proj.weight' has shape [5, 64], not [96, 64] (and 1 more)",
        "tensor 'model.\\x1b[31mred' does not belong to this architecture",
    ]
    assert "\x1b" not in str(found)


def test_other_architectures_are_described_as_far_as_possible(folder, tmp_path) -> None:
    change(folder, model_type="mixtral\x1b[2J", num_local_experts=8, vocab_size=1 << 60, head_dim=0)
    found = report(folder)
    assert not found.supported and "num_local_experts = 8" in found.problems[1]
    assert "is not supported, only llama, mistral" in found.problems[0]
    assert found.sizes["blocks"] == 2 and found.text is not None and "\x1b" not in str(found)
    config = small_config()
    write_gguf(tmp_path / "x.gguf", replace(config), random_weights(config, SEED))
    data = (tmp_path / "x.gguf").read_bytes().replace(b"llama", b"gemma")
    (tmp_path / "x.gguf").write_bytes(data)
    found = report(tmp_path / "x.gguf")
    assert "architecture 'gemma' is not supported" in found.problems[0]
    assert found.sizes["hidden"] == 64 and found.speed is None
    assert max(map(len, str(found).split("\n"))) <= 80


def test_warnings_are_notes(folder) -> None:
    change(folder, some_tool=1)
    assert report(folder).notes == ["config.json: unknown settings are ignored: 'some_tool'"]


def test_what_is_no_model_is_an_error(tmp_path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name, message in (
        ("nowhere", "not a model"),
        ("model.gguf", "truncated GGUF header"),
        ("", "config.json: No such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            report(tmp_path / name)


# How much is read.


def test_only_headers_are_read(tmp_path) -> None:
    """Of a folder of 141 GB, whose weights are a hole in the file."""
    config = replace(MODELS["Llama-3.1-8B"], hidden=8192, ffn_hidden=28_672, blocks=80, heads=64)
    (tmp_path / "config.json").write_text(json.dumps(hf_settings(config)))
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    header, end = {}, 0
    for name, shape in tensor_shapes(config):
        start, end = end, end + 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        header[stored_name(name, "llama")] = entry
    content = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = report(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert found.supported and found.stored_bytes > 141e9
    assert found.parameters == 70_553_706_496 and found.stored == {"BF16": found.parameters}
    assert [limit.what for limit in found.limits] == [
        "hidden size",
        "FFN size",
        "width of all heads",
    ]
