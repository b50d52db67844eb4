# SPDX-License-Identifier: Apache-2.0
"""`from_transformers` without transformers: objects with the methods that it uses.

`make check-models` does the same with the real ones.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import speq
from speq.model.checkpoint import ARCHITECTURES, CheckpointError
from speq.model.loaders import from_transformers, load_model
from speq.model.speculation import generate
from tests.model.reference_models import REFERENCE, write_seeded_folder
from tests.model.small_models import byte_level_tokenizer, random_weights, small_config, write_hf

MODELS = json.loads(REFERENCE.read_text())
#: A model of each architecture.
EACH = {entry["settings"]["model_type"]: name for name, entry in MODELS.items()}


class Values:
    """A configuration: its attributes are its settings."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class ModelForCausalLM:
    """A model with the tensors and the configuration of a folder."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        settings = json.loads((folder / "config.json").read_text()) | {"architectures": None}
        self.config = Values(settings | changes)
        (file,) = folder.glob("*.safetensors")
        self.tensors = load_file(file)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors


class Tokenizer:
    """A tokenizer that saves a folder's files."""

    def __init__(self, folder: Path) -> None:
        self.backend_tokenizer, self.folder = byte_level_tokenizer(), folder

    def save_pretrained(self, folder: Path) -> None:
        for file in self.folder.glob("*tokenizer*"):
            shutil.copy(file, folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small Llama in FP32 with a head of its own."""
    config = small_config(tied_head=False)
    write_hf(tmp_path / "model", config, random_weights(config, 0), torch.float32)
    return tmp_path / "model"


@pytest.mark.parametrize("name", EACH.values())
def test_objects_are_read_like_folders(tmp_path, name) -> None:
    entry = MODELS[name]
    folder = tmp_path / "model"
    write_seeded_folder(folder, entry["settings"], entry["shapes"], entry["seed"])
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"}'
    )
    expected = load_model(folder)
    model = ModelForCausalLM(folder)
    if expected.config.tied_head:  # the state dict has it twice
        model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"]
    mine = from_transformers(model, Tokenizer(folder))
    assert mine.config == expected.config
    assert list(mine.weights) == list(expected.weights)
    for weight, theirs in zip(mine.weights.values(), expected.weights.values(), strict=True):
        assert torch.equal(weight.view(torch.int16), theirs.view(torch.int16))
    assert mine.tokenizer.stop_ids == expected.tokenizer.stop_ids
    assert mine.tokenizer.limit == expected.tokenizer.limit == mine.config.vocab_size
    assert mine.tokenizer.encode_chat("hello") == expected.tokenizer.encode_chat("hello")
    assert mine.name == "ModelForCausalLM"


def test_every_architecture_is_among_them() -> None:
    assert {kind.removesuffix("_text") for kind in EACH} == {*ARCHITECTURES}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_copies(folder, dtype) -> None:
    """Rounded like those of a file, of whatever precision the model has."""
    model = ModelForCausalLM(folder)
    model.tensors = {name: tensor.to(dtype) for name, tensor in model.tensors.items()}
    expected = {name: t.clone().to(torch.float16) for name, t in model.tensors.items()}
    mine = from_transformers(model)
    for tensor in model.tensors.values():
        tensor.zero_()
    assert torch.equal(mine.weights["embedding"], expected["model.embed_tokens.weight"])
    assert torch.equal(mine.weights["final_norm"], expected["model.norm.weight"])


def test_a_model_without_a_tokenizer_takes_ids(folder) -> None:
    model = from_transformers(ModelForCausalLM(folder, eos_token_id=[7, 9]))
    assert model.tokenizer.stop_ids == {7, 9}
    tokens = [t for s in generate(load_model(folder), [3, 4], None, max_tokens=4) for t in s.tokens]
    made = speq.generate(model, [3, 4], max_tokens=4)
    assert made.tokens == tokens and made.text == ""
    with pytest.raises(ValueError, match="the model has no tokenizer: give it to from_transf"):
        speq.generate(model, "hello")


def test_the_generation_settings_say_what_ends_a_reply(folder) -> None:
    """As in a folder, they come before the model's own."""
    model = ModelForCausalLM(folder, eos_token_id=7)
    settings = {"eos_token_id": [11, 12], "pad_token_id": None, "temperature": None}
    model.generation_config = Values(settings)
    assert from_transformers(model).tokenizer.stop_ids == {11, 12}
    model.generation_config = Values({"eos_token_id": None})
    assert from_transformers(model).tokenizer.stop_ids == {7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "architecture 'bert' is not supported, only llama, mistral"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "RoPE scaling 'yarn' is not supported"),
        ({"num_local_experts": 8}, "setting num_local_experts = 8 is not supported, only 0 or 1"),
    ],
)
def test_unsupported_models_are_refused_like_folders(folder, changes, message) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    said = []
    for function, argument in (
        (load_model, folder),
        (from_transformers, ModelForCausalLM(folder, _name_or_path=str(folder))),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            function(argument)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_tensors_that_cannot_be_used_are_named(folder) -> None:
    for dtype, device, value, message in (
        (torch.float64, "cpu", 0.0, "'lm_head.weight' is F64, only F16, BF16, F32 are"),
        (torch.float32, "meta", 0.0, "'lm_head.weight' is not in memory: load the model without"),
        (torch.float32, "cpu", float("nan"), "head cannot be computed with: "),
    ):
        model = ModelForCausalLM(folder)
        shape = model.tensors["lm_head.weight"].shape
        model.tensors["lm_head.weight"] = torch.full(shape, value, dtype=dtype, device=device)
        with pytest.raises(CheckpointError, match=f"ModelForCausalLM: .*{re.escape(message)}"):
            from_transformers(model)
    del model.tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' is missing"):
        from_transformers(model)


def test_other_objects_are_refused(folder) -> None:
    class Base(ModelForCausalLM):
        """A model without a head."""

    for model, tokenizer, error, message in (
        ("tiny", None, TypeError, "this is a str, not a model of transformers"),
        (load_model("tiny"), None, TypeError, "this is a Model, not a model of transformers"),
        (ModelForCausalLM(folder), "gpt2", TypeError, "this is a str, not a fast tokenizer"),
        (Base(folder), None, CheckpointError, "architectures = ['Base'] is not supported"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            from_transformers(model, tokenizer)
