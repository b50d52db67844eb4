# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints: `load_model` finds the reader for a file's format, `read_config` reads its
dimensions alone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from speq.model.aliases import ALIASES, NOT_A_MODEL, smollm2_path, tiny_path
from speq.model.checkpoint import CheckpointError, Model, ModelConfig, check_finite
from speq.model.loaders.gguf import gguf_config, load_gguf
from speq.model.loaders.hf import hf_config, load_hf
from speq.model.loaders.llama2c import llama2c_config, load_llama2c

__all__ = ["ALIASES", "load_model", "read_config", "smollm2_path", "tiny_path"]

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
    path = _path(name_or_path)
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
    config, weights, read = parts
    _log.debug(
        "%s is a model of the architecture %s: %d blocks, hidden size %d, %d tokens, context %d",
        path,
        *(config.architecture, config.blocks, config.hidden, config.vocab_size, config.context),
    )
    beyond = [token for token in read.leading if not 0 <= token < config.vocab_size]
    if beyond:
        raise CheckpointError(
            f"{path}: every text begins with token {beyond[0]}, but the model has only ids "
            f"0..{config.vocab_size - 1}"
        )
    model = Model(str(name_or_path), config, weights, replace(read, limit=config.vocab_size))
    if decoding:
        try:
            check_finite(model.weights)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return model


def read_config(name_or_path: str | Path) -> ModelConfig:
    """The configuration of a model, without its weights.

    Parameters
    ----------
    name_or_path : str or Path
        As of `load_model`, or a config.json of Hugging Face. Of a folder only this file is read, of
        the others only the header.

    Raises
    ------
    CheckpointError
        With one line that names the file and what is wrong with it.
    """
    path = _path(name_or_path)
    with _naming(path):
        if path.is_dir():
            return hf_config(path / "config.json")
        for ending, read in (
            (".json", hf_config),
            (".gguf", gguf_config),
            (".bin", llama2c_config),
        ):
            if path.suffix == ending:
                return read(path)
        raise CheckpointError(f"{NOT_A_MODEL}, nor a config.json")


def _path(name_or_path: str | Path) -> Path:
    alias = ALIASES.get(str(name_or_path))
    return alias() if alias else Path(name_or_path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with a model becomes a CheckpointError that names it."""
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
