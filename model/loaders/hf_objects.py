# SPDX-License-Identifier: Apache-2.0
"""Models of `transformers` that are in memory.

They are read like the folder that they would be saved as: the configuration by `hf`, with the same
refusals, the weights from the state dict in the place of safetensors files, the tokenizer from the
files that it saves itself. `transformers` is not imported: the objects bring what is needed.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speq.model.checkpoint import CheckpointError, ModelConfig
from speq.model.loaders.hf import config_of, read_weights
from speq.model.loaders.hf_tokenizer import read_tokenizer, stop_ids
from speq.model.tokenizer import Tokenizer, Vocabulary

#: What safetensors calls the types that weights may have.
_DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def load_objects(
    model: Any, tokenizer: Any
) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Configuration, FP16 weights and tokenizer of a model and its tokenizer, which may be None.

    Raises
    ------
    CheckpointError
        As for a folder.
    TypeError
        If they are not what `transformers` calls a model and a fast tokenizer.
    """
    _check_types(model, tokenizer)
    # As JSON, so that all values are what a file would have. A class that computes no logits is
    # refused by its name, which saving would write.
    settings = json.loads(json.dumps(model.config.to_dict(), default=str))
    settings["architectures"] = [type(model).__name__]
    config = config_of(settings)
    state = _State(model.state_dict())
    config, weights = read_weights(config, dict.fromkeys(state.tensors, state))
    with tempfile.TemporaryDirectory(prefix="speq-") as name:
        folder = Path(name)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            content = {k: v for k, v in generation.to_dict().items() if v is not None}
            (folder / "generation_config.json").write_text(json.dumps(content, default=str))
        if tokenizer is None:
            return config, weights, _without_text(stop_ids(folder, settings))
        tokenizer.save_pretrained(folder)
        return config, weights, read_tokenizer(folder, settings)


def _check_types(model: Any, tokenizer: Any) -> None:
    if not hasattr(getattr(model, "config", None), "to_dict") or not hasattr(model, "state_dict"):
        raise TypeError(
            f"this is a {type(model).__name__}, not a model of transformers "
            "(AutoModelForCausalLM.from_pretrained gives one); speq.load reads files and folders"
        )
    if tokenizer is not None and not hasattr(tokenizer, "backend_tokenizer"):
        raise TypeError(
            f"this is a {type(tokenizer).__name__}, not a fast tokenizer of transformers, which "
            "has a backend_tokenizer (AutoTokenizer.from_pretrained gives one)"
        )


def _without_text(ends: list[int]) -> Tokenizer:
    """In the place of a tokenizer: no text has ids, and no id is text."""

    def refuse(text: str) -> list[int]:
        raise ValueError(
            "the model has no tokenizer: give it to from_transformers, or token ids as the prompt"
        )

    return Tokenizer(Vocabulary(refuse, lambda token: None, {}), frozenset(ends))


@dataclass(frozen=True)
class _State:
    """A state dict with the methods of an open safetensors file that are needed."""

    tensors: dict[str, torch.Tensor]

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.get_slice(name)[:]

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(name, self.tensors[name])


@dataclass(frozen=True)
class _Slice:
    """A tensor of it."""

    name: str
    tensor: torch.Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPES.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """A copy, so that nothing that happens to the model changes it."""
        if self.tensor.is_meta:
            raise CheckpointError(
                f"tensor {self.name!r} is not in memory: load the model without offloading"
            )
        return self.tensor.detach()[rows].to("cpu", copy=True)
