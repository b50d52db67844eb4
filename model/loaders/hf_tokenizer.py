# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a Hugging Face folder: tokenizer.json and the settings beside it."""

from pathlib import Path
from typing import Any

import tokenizers

from speq.model.checkpoint import CheckpointError
from speq.model.loaders.json_file import read_json
from speq.model.tokenizer import Tokenizer

_MAX_TOKENIZER = 1 << 26  # bytes of tokenizer.json


def read_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """The folder's tokenizer; `settings` is the content of config.json. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if path.stat().st_size > _MAX_TOKENIZER:
        raise CheckpointError(f"{path.name} is larger than {_MAX_TOKENIZER} bytes")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        opening = backend.encode("", add_special_tokens=True).ids
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{path.name}: {error}") from error
    stop = settings.get("eos_token_id")
    if (folder / "generation_config.json").exists():
        stop = read_json(folder / "generation_config.json").get("eos_token_id", stop)
    stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if any(type(token) is not int for token in stop):
        raise CheckpointError("eos_token_id is not a token id")
    template = ""
    if (folder / "tokenizer_config.json").exists():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return Tokenizer(
        backend,
        stop_ids=frozenset(stop),
        bos_id=opening[0] if opening else None,
        chat_template=template if isinstance(template, str) else "",
    )
