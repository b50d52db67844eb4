# SPDX-License-Identifier: Apache-2.0
"""JSON files of Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

from speq.model.checkpoint import CheckpointError
from speq.model.input_file import read_limited

_MAX_JSON = 1 << 24  # bytes; Gemma 3's tokenizer_config.json has 1.16 MB


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, and OSError if it cannot be read."""
    data = read_limited(path, _MAX_JSON)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object")
    return value
