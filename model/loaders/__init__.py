# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints: `load_model` finds the reader for a file's format, `read_config` reads no
more than what the file says about itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from speq.model.aliases import ALIASES, NOT_A_MODEL, smollm2_path, tiny_path
from speq.model.checkpoint import CheckpointError, Model, ModelConfig, check_finite
from speq.model.loaders.gguf import load_gguf, read_gguf_config, read_gguf_header
from speq.model.loaders.header import Header
from speq.model.loaders.hf import load_hf, read_hf_config, read_hf_header
from speq.model.loaders.hf_objects import load_objects
from speq.model.loaders.llama2c import load_llama2c, read_llama2c_config, read_llama2c_header
from speq.model.tokenizer import Tokenizer

__all__ = [
    "ALIASES",
    "from_transformers",
    "load_model",
    "read_config",
    "read_header",
    "smollm2_path",
    "tiny_path",
]

_log = logging.getLogger(__name__)


def load_model(
    name_or_path: str | Path, tokenizer: str | Path | None = None, *, decoding: bool = True
) -> Model:
    """Loads a model.

    Parameters
    ----------
    name_or_path : str or Path
        An alias ("smollm2", "tiny") or a path: a .gguf file (of a split one the first part), a
        Hugging Face folder (config.json, safetensors files, tokenizer.json) or a llama2.c .bin
        file.
    tokenizer : str or Path, optional
        Tokenizer of a .bin file, by default tokenizer.bin or tok<vocabulary size>.bin beside it.
    decoding : bool
        The model is to compute something, so that all its weights must be finite in FP16.

    Raises
    ------
    CheckpointError
        With one line that names the file and what is wrong with it.
    """
    path = _located(name_or_path)
    _log.debug("loading %s with torch %s", path, torch.__version__)
    with _naming(path):
        if path.is_dir():
            parts = load_hf(path)
        elif path.suffix == ".gguf":
            parts = load_gguf(path)
        elif path.suffix == ".bin":
            parts = load_llama2c(path, Path(tokenizer) if tokenizer else None)
        else:
            raise CheckpointError(NOT_A_MODEL)
    model = _model(str(name_or_path), path, *parts)
    if decoding:
        with _naming(path):
            check_finite(model.weights)
    return model


def from_transformers(model: Any, tokenizer: Any = None) -> Model:
    """A model of `transformers` as the accelerator sees it, with the same bits as the folder that
    it would be saved as.

    The weights are copied and rounded to FP16, so that the original can go. What `load_model`
    refuses of a folder is refused here, in the same words.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A ...ForCausalLM of a supported architecture, with weights in FP16, BF16 or FP32, wherever
        they are but not offloaded.
    tokenizer : transformers.PreTrainedTokenizerFast, optional
        Its fast tokenizer, with special tokens and chat template. Without one, prompts are token
        ids and texts are empty.

    Returns
    -------
    Model

    Raises
    ------
    CheckpointError
        With one line that says what is wrong with the model.
    TypeError
        If the objects are not such.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    with _naming(Path(name)):
        parts = load_objects(model, tokenizer)
    result = _model(name, Path(name), *parts)
    with _naming(Path(name)):
        check_finite(result.weights)
    return result


def _model(
    name: str,
    path: Path,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
) -> Model:
    """The model of these parts, whose texts must begin with tokens that it has."""
    _log.debug(
        "%s is a model of the architecture %s: %d blocks, hidden size %d, %d tokens, context %d",
        path,
        *(config.architecture, config.blocks, config.hidden, config.vocab_size, config.context),
    )
    beyond = [token for token in tokenizer.leading if not 0 <= token < config.vocab_size]
    if beyond:
        raise CheckpointError(
            f"{path}: every text begins with token {beyond[0]}, but the model has only ids "
            f"0..{config.vocab_size - 1}"
        )
    return Model(name, config, weights, replace(tokenizer, limit=config.vocab_size))


def read_config(name_or_path: str | Path) -> ModelConfig:
    """The configuration of a model, from headers alone: no weights are read.

    A head that a Hugging Face folder stores although its settings tie it to the embedding counts as
    tied, which only a comparison of the weights could tell.

    Parameters
    ----------
    name_or_path : str or Path
        As of `load_model`, or a config.json of Hugging Face.

    Raises
    ------
    CheckpointError
        As by `load_model`, for what can be known without the weights.
    """
    path = _located(name_or_path)
    with _naming(path):
        if path.is_dir():
            return read_hf_config(path / "config.json")
        if path.suffix == ".json":
            return read_hf_config(path)
        if path.suffix == ".gguf":
            return read_gguf_config(path)
        if path.suffix == ".bin":
            return read_llama2c_config(path)
        raise CheckpointError(f"{NOT_A_MODEL}, nor a config.json")


def read_header(name_or_path: str | Path) -> Header:
    """What a model's files say about it, from headers alone, also of one that is not supported.

    No weight is read, so that the size of a model does not matter; the tokenizer is.

    Parameters
    ----------
    name_or_path : str or Path
        As of `load_model`.

    Raises
    ------
    CheckpointError
        If there is no such file or it is none of a model.
    """
    path = _located(name_or_path)
    with _naming(path):
        if path.is_dir():
            return read_hf_header(path)
        if path.suffix == ".gguf":
            return read_gguf_header(path)
        if path.suffix == ".bin":
            return read_llama2c_header(path)
        raise CheckpointError(NOT_A_MODEL)


def _located(name_or_path: str | Path) -> Path:
    """Where a model lies. Raises CheckpointError if it is the alias of one that is not there."""
    alias = ALIASES.get(str(name_or_path))
    return alias() if alias else Path(name_or_path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors in reading a model become one CheckpointError that names it."""
    try:
        yield
    except MemoryError as error:
        raise CheckpointError(f"{path}: not enough memory to load it") from error
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _unreadable(path: Path, error: OSError) -> str:
    """Which file of a model at `path` cannot be read, and why."""
    return f"{error.filename or path}: {error.strerror}" if error.strerror else f"{path}: {error}"
