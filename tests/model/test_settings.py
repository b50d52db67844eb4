# SPDX-License-Identifier: Apache-2.0
"""Settings in checkpoints as contracts: used, without influence, or refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from speq.model.checkpoint import LINEARS, CheckpointError, ModelConfig
from speq.model.loaders import load_model
from speq.model.loaders.gguf_file import read_gguf
from speq.sim.runner import seed
from tests.model.small_models import (
    hf_settings,
    random_weights,
    small_config,
    write_gguf,
    write_hf,
)

SEED = seed()
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_config(tmp_path: Path, architecture: str = "llama", /, **settings: object) -> ModelConfig:
    """Configuration of a folder whose config.json has other settings, None for none at all."""
    config = small_config(architecture, blocks=4, windowed=(), unrotated=(), sliding_window=None)
    folder = tmp_path / "folder"
    if not folder.exists():
        write_hf(folder, config, random_weights(config, SEED))
    written = hf_settings(config) | settings
    written = {key: value for key, value in written.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(written))
    return load_model(folder).config


# Hugging Face: settings that are used.


@pytest.mark.parametrize(
    ("architecture", "settings", "windowed"),
    [
        ("mistral", {"sliding_window": 5}, (0, 1, 2, 3)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": ...}, (0, 1, 2, 3)),  # the published default, 4096
        ("phi3", {"sliding_window": 5}, (0, 1, 2, 3)),
        ("phi3", {"sliding_window": ...}, ()),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 5}, ()),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
            (3,),
        ),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 9}, ()),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (1, 3),
        ),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0, 1, 0]},
            (1, 3),
        ),
        ("smollm3", {"sliding_window": 5, "no_rope_layers": [1, 0, 1, 0]}, ()),
        ("gemma3", {"sliding_window": 5, "layer_types": ...}, (0, 1, 2, 3)),
        (
            "gemma3",
            {"sliding_window": 5, "layer_types": ..., "sliding_window_pattern": 2},
            (0, 2),
        ),
        (
            "gemma3",
            {
                "sliding_window": 5,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "_sliding_window_pattern": 6,  # which `transformers` stores beside any list
            },
            (1, 3),
        ),
    ],
)
def test_sliding_windows_of_blocks(tmp_path, architecture, settings, windowed):
    config = hf_config(tmp_path, architecture, **settings)
    assert config.windowed == windowed
    size = 4096 if settings["sliding_window"] is ... else settings["sliding_window"]
    assert config.sliding_window == (size if windowed else None)
    assert config.local_rope_base == (10_000.0 if architecture == "gemma3" else None)


def test_blocks_without_rotary_embedding(tmp_path):
    assert hf_config(tmp_path, "smollm3", no_rope_layers=...).unrotated == (3,)
    assert hf_config(tmp_path, "smollm3", no_rope_layers=[0, 1, 1, 0]).unrotated == (0, 3)
    interval = {"no_rope_layers": ..., "no_rope_layer_interval": 2}
    assert hf_config(tmp_path, "smollm3", **interval).unrotated == (1, 3)
    # `transformers` stores its default interval beside any list.
    both = {"no_rope_layers": [0, 1, 1, 1], "no_rope_layer_interval": 4}
    assert hf_config(tmp_path, "smollm3", **both).unrotated == (0,)


def test_what_a_file_leaves_out(tmp_path):
    """The values of `transformers`, not those of Llama."""
    assert hf_config(tmp_path, "llama", rope_theta=...).rope_base == 1e4
    shutil.rmtree(tmp_path / "folder")
    assert hf_config(tmp_path, "smollm3", rope_theta=...).rope_base == 2e6
    assert hf_config(tmp_path, "smollm3", tie_word_embeddings=...).tied_head
    shutil.rmtree(tmp_path / "folder")
    assert hf_config(tmp_path, "phi3", rms_norm_eps=...).norm_eps == 1e-5
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.self_attn\.qkv_proj\.weight'"):
        hf_config(tmp_path, "phi3", num_key_value_heads=...)  # as many as heads
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="4 heads do not divide into 8 KV heads"):
        hf_config(tmp_path, "mistral", num_key_value_heads=...)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight' has shape \[32, 64\], not \[64"):
        hf_config(tmp_path, "mistral", num_key_value_heads=None)


def test_multipliers_and_biases(tmp_path):
    granite = {"embedding_multiplier": 12, "residual_multiplier": 0.5, "logits_scaling": 4.0}
    config = hf_config(tmp_path, "granite", attention_multiplier=0.125, **granite)
    assert (config.embedding_scale, config.residual_scale) == (12.0, 0.5)
    assert (config.logit_scale, config.attention_scale) == (0.25, 0.125)
    assert config.biases == LINEARS
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match=r"logits_scaling = .* is not a positive number"):
            hf_config(tmp_path, "granite", logits_scaling=value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_spellings_of_rotary_scaling(tmp_path, key, name):
    linear = {name: "linear", "factor": 4}
    assert hf_config(tmp_path, **{key: linear}).rope_divisors == (4.0,) * 8
    llama3 = {name if k == "rope_type" else k: v for k, v in LLAMA3.items()}
    assert len(set(hf_config(tmp_path, **{key: llama3}).rope_divisors)) > 1
    default = {name: "default", "rope_theta": 500.0}
    assert hf_config(tmp_path, **{key: default, "rope_theta": ...}).rope_base == 500.0


def test_rotary_settings_by_type_of_attention(tmp_path):
    """Newer files of Gemma; a scaling beside them is that of global attention."""
    both = {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    newer = {"rope_parameters": both, "rope_theta": ..., "rope_local_base_freq": ...}
    config = hf_config(tmp_path, "gemma3", layer_types=..., sliding_window=5, **newer)
    assert (config.rope_base, config.local_rope_base) == (500.0, 50.0)
    assert config.rope_divisors is None
    del both["full_attention"]["rope_type"]
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert hf_config(tmp_path, "gemma3", **newer, **scaling).rope_divisors == (8.0,) * 8


def test_a_stored_head_is_the_models(tmp_path):
    """Whatever the setting says, as in `transformers`; a copy of the embedding stays one matrix."""
    config = small_config()
    assert config.tied_head
    weights = random_weights(config, SEED)
    write_hf(tmp_path / "folder", config, weights)
    file = next((tmp_path / "folder").glob("*.safetensors"))
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": weights["embedding"].half()}, file)
    assert load_model(tmp_path / "folder").config.tied_head
    save_file(tensors | {"lm_head.weight": (2 * weights["embedding"]).half()}, file)
    model = load_model(tmp_path / "folder")
    assert not model.config.tied_head
    assert torch.equal(model.linear_weight("head"), (2 * weights["embedding"]).half())
    save_file(tensors | {"lm_head.weight": torch.ones(3, 64)}, file)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' has shape \[3, 64\]"):
        load_model(tmp_path / "folder")


# Hugging Face: settings that are refused, or named.


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"logits_scaling": 8.0}, "setting logits_scaling = 8.0 is not supported, only 1"),
        ("llama", {"sliding_window": 5}, "setting sliding_window = 5 is not supported, only null"),
        ("llama", {"num_local_experts": 8}, "setting num_local_experts = 8"),
        ("llama", {"no_rope_layers": [1, 0, 1, 0]}, "setting no_rope_layers"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "setting architectures"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types contradicts"),
        ("llama", {"layer_types": ["linear_attention"] * 4}, "layer_types = 'linear_attention'"),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 blocks"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "RoPE scaling 'longrope'"),
        ("qwen2", {"attention_bias": True}, "setting attention_bias = True"),
        ("qwen2", {"use_sliding_window": 1}, "'use_sliding_window' has the wrong type"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types contradicts"),
        (
            "gemma3",
            {"sliding_window": 5, "sliding_window_pattern": 2, "_sliding_window_pattern": 3},
            "settings contradict each other: sliding_window_pattern = 2, _sliding_window_pattern",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "RoPE settings by type of attention are not supported, only for gemma3",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {}, "factor": 2.0}},
            "setting factor of rope_parameters",
        ),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is not positive"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only gelu"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers is not a list of 4 times"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
            "contradict each other: rope_type = 'llama3', type = 'linear'",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}},
            "setting mscale = 0.7 of RoPE scaling 'linear'",
        ),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "setting factor = 2.0 of RoPE scaling 'def"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            r"settings contradict each other: rope_theta = 10000.0, rope_parameters.rope_theta",
        ),
        (
            "llama",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"type": "linear", "factor": 3.0},
            },
            "rope_scaling and rope_parameters contradict each other: factor",
        ),
    ],
)
def test_settings_that_are_refused(tmp_path, architecture, settings, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_config(tmp_path, architecture, **settings)
    assert "\n" not in str(caught.value)


def test_unknown_settings_are_named(tmp_path):
    known = {"torch_dtype": "float16", "pretraining_tp": 1, "temperature": 0.5, "use_cache": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_config(tmp_path, **known, new_of_next_year=None)
    with pytest.warns(UserWarning, match="unknown settings are ignored: 'new_of_next_year'"):
        hf_config(tmp_path, **known, new_of_next_year=3)


# Hugging Face: which files.


@pytest.fixture
def folder(tmp_path):
    config = small_config()
    write_hf(tmp_path / "folder", config, random_weights(config, SEED), shards=3)
    return tmp_path / "folder"


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def write_index(folder: Path, **changes: str) -> None:
    table = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    table = {name: changes.get(file, file) for name, file in table.items()}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_files_that_an_index_names(folder):
    expected = load_model(folder).weights
    for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(folder / f"part{i}.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors .*; rename part0"):
        load_model(folder)
    write_index(folder)
    # What the index does not name is not part of the model.
    save_file({"other": torch.ones(1)}, folder / "model-00001-of-00001.safetensors")
    weights = load_model(folder).weights
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for name, message in [("gone.safetensors", "is missing"), ("../x.safetensors", "no file bes")]:
        write_index(folder, **{"part1.safetensors": name})
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)
    write_index(folder, **{"part1.safetensors": "part0.safetensors"})
    with pytest.raises(CheckpointError, match=r"in another file|which no file has"):
        load_model(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors"):
        load_model(folder)


def test_single_and_sharded_files_together(folder):
    tensors = merged(folder)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and model-00001-of-00003"):
        load_model(folder)
    for path in folder.glob("model-*"):
        path.unlink()
    load_model(folder)
    save_file(tensors, folder / "model.fp16.safetensors")
    with pytest.warns(UserWarning, match=r"model\.fp16\.safetensors is ignored"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rename model\.fp16\.safetensors"):
        load_model(folder)


# GGUF.


def gguf_file(
    path: Path,
    architecture: str = "llama",
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **changes: object,
) -> Path:
    """A GGUF file to which `add` has added something."""
    config = small_config(architecture, **changes)
    original = gguf.GGUFWriter.write_header_to_file

    def write_header(writer: gguf.GGUFWriter) -> None:
        add(writer)
        original(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", write_header)
        write_gguf(path, config, random_weights(config, SEED))
    return path


def test_rotary_factor_alone_is_linear_scaling(tmp_path):
    """As llama.cpp reads it, also under the older name."""
    path = tmp_path / "model.gguf"

    def divisors(*fields: tuple[str, object]) -> tuple[float, ...] | None:
        def add(writer: gguf.GGUFWriter) -> None:
            for key, value in fields:
                put = writer.add_string if isinstance(value, str) else writer.add_float32
                put(f"llama.rope.{key}", value)

        return load_model(gguf_file(path, add=add)).config.rope_divisors

    assert divisors(("scaling.factor", 4.0)) == (4.0,) * 8
    assert divisors(("scale_linear", 4.0)) == (4.0,) * 8
    assert divisors(("scaling.type", "linear"), ("scaling.factor", 4.0)) == (4.0,) * 8
    assert divisors(("scaling.factor", 4.0), ("scale_linear", 4.0)) == (4.0,) * 8
    assert divisors(("scaling.factor", 0.0)) is None
    assert divisors(("scaling.type", "none"), ("scaling.factor", 1.0)) is None
    with pytest.raises(CheckpointError, match="factors contradict each other"):
        divisors(("scaling.factor", 4.0), ("scale_linear", 2.0))
    with pytest.raises(CheckpointError, match="'none' contradicts a factor of 4"):
        divisors(("scaling.type", "none"), ("scaling.factor", 4.0))
    with pytest.raises(CheckpointError, match="RoPE scaling 'yarn' is not supported"):
        divisors(("scaling.type", "yarn"), ("scaling.factor", 4.0))


@pytest.mark.parametrize(
    ("architecture", "add", "message"),
    [
        ("llama", lambda w: w.add_uint32("llama.next_year", 3), r"field 'llama.next_year' is unkn"),
        ("llama", lambda w: w.add_expert_count(8), r"llama.expert_count = 8 is not supported"),
        ("llama", lambda w: w.add_logit_scale(8.0), r"llama.logit_scale = 8.0 is not supported"),
        ("qwen2", lambda w: w.add_sliding_window(5), r"sliding_window = 5 is not supported, only"),
        ("llama", lambda w: w.add_value_length(8), r"attention.value_length = 8 is not supported"),
        ("llama", lambda w: w.add_rope_dimension_count(8), "RoPE on a part of the head dimension"),
        ("llama", lambda w: w.add_causal_attention(False), r"attention.causal = False"),
        ("llama", lambda w: w.add_type("adapter"), "general.type is 'adapter'"),
        (
            "phi3",
            lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)),
            "RoPE scaling 'longrope'",
        ),
        (
            "gemma3",
            lambda w: w.add_array("gemma3.attention.sliding_window_pattern", [True]),
            "sliding_window_pattern is not 3 times true or false",
        ),
        (
            "llama",
            lambda w: w.add_tensor("blk.1.attn_k.bias", np.ones(32, np.float32)),
            r"tensor 'blk\.1\.attn_k\.bias' does not belong",
        ),
    ],
)
def test_fields_that_are_refused(tmp_path, architecture, add, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(gguf_file(tmp_path / "model.gguf", architecture, add))
    assert "\n" not in str(caught.value)


def test_fields_that_are_used_or_named(tmp_path):
    path = tmp_path / "model.gguf"
    pattern = [True, False, True]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_array("gemma3.attention.sliding_window_pattern", pattern)
        writer.add_float32("gemma3.rope.freq_base_swa", 500.0)

    config = load_model(gguf_file(path, "gemma3", add)).config
    assert (config.windowed, config.local_rope_base) == ((0, 2), 500.0)
    config = load_model(gguf_file(path, add=lambda w: w.add_attention_scale(0.5))).config
    assert config.attention_scale == 0.5
    switch = "granite.rope.scaling.finetuned"
    config = load_model(gguf_file(path, "granite", lambda w: w.add_bool(switch, False))).config
    assert config.unrotated == (0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(gguf_file(path, add=lambda w: w.add_uint32("quantize.imatrix.entries", 3)))
    with pytest.warns(UserWarning, match=r"ignored: 'other\.field'"):
        load_model(gguf_file(path, add=lambda w: w.add_uint32("other.field", 3)))


def test_biases_are_those_in_the_file(tmp_path):
    """Llama's may have some; rows of q and k are reordered with their weights."""
    path, biases = tmp_path / "model.gguf", ("q_proj", "o_proj", "down_proj")
    config = small_config(biases=biases)
    weights = random_weights(config, SEED)
    write_gguf(path, config, weights)
    model = load_model(path)
    assert model.config.biases == biases
    for name in biases:
        assert torch.equal(
            model.weights[f"block.1.{name}.bias"], weights[f"block.1.{name}.bias"].half()
        )
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.bias' is missing"):
        load_model(gguf_file(path, "qwen2", biases=()))


@pytest.fixture
def parts(tmp_path):
    """A model split into three files as the gguf package splits it, and the whole."""
    whole = gguf_file(tmp_path / "whole.gguf")
    original = gguf.GGUFWriter.__init__

    def split(writer: gguf.GGUFWriter, path: Path, arch: str) -> None:
        original(writer, path, arch, split_max_tensors=8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "__init__", split)
        gguf_file(tmp_path / "model.gguf")
    return whole, sorted(tmp_path.glob("model-*-of-00003.gguf"))


def test_split_files(parts):
    whole, (first, second, third) = parts
    model, expected = load_model(first), load_model(whole)
    assert model.config == expected.config
    assert model.weights.keys() == expected.weights.keys()
    assert all(torch.equal(w, expected.weights[name]) for name, w in model.weights.items())
    for later in (second, third):
        with pytest.raises(CheckpointError, match=r"give the first, model-00001-of-00003\.gguf"):
            load_model(later)
    shutil.copyfile(second, third)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003.*split\.no and split\.count"):
        load_model(first)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.gguf"):
        load_model(first)
    first.rename(first.with_name("renamed.gguf"))
    with pytest.raises(CheckpointError, match="the file's name is not that of part 1 of 3"):
        load_model(first.with_name("renamed.gguf"))


def test_big_endian_files_are_named(tmp_path):
    config = small_config()
    original = gguf.GGUFWriter.__init__

    def swapped(writer: gguf.GGUFWriter, path: Path, arch: str) -> None:
        original(writer, path, arch, endianess=gguf.GGUFEndian.BIG)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "__init__", swapped)
        write_gguf(tmp_path / "model.gguf", config, random_weights(config, SEED))
    with pytest.raises(CheckpointError, match=r"big-endian.*gguf-convert-endian"):
        read_gguf(tmp_path / "model.gguf")


# Weights.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65520.0])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    config = small_config()
    weights = random_weights(config, SEED)
    weights["block.1.up_proj"][2, 3:5] = value
    write_hf(tmp_path / "folder", config, weights, torch.float32)
    with (
        warnings.catch_warnings(),
        pytest.raises(CheckpointError, match=r"block\.1\.up_proj .* 2 of its .* at \[2, 3\]"),
    ):
        warnings.simplefilter("ignore")
        load_model(tmp_path / "folder")
