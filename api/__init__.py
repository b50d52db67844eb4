# SPDX-License-Identifier: Apache-2.0
"""SPEQ from Python: the names that most users need, with docs/api.md as their manual.

`import speq` loads nothing else: a name loads what it needs when it is first used, so that
`speq.build_verilog` never waits for torch. The packages behind it (`speq.model`, `speq.hw`,
`speq.host`, `speq.sim`) are imported by their own names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speq._generation import Chunk, Generation, generate, stream
    from speq._hardware import build_verilog, gemm, simulate, simulated_session
    from speq._models import encode, read_encoded, write_encoded
    from speq.host.inspection import Report, report
    from speq.host.session import Session
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.engine_config import EngineConfig
    from speq.hw.memory.axi import AxiConfig
    from speq.model.checkpoint import CheckpointError, Model, ModelConfig
    from speq.model.encoded_file import EncodedModel
    from speq.model.loaders import from_transformers
    from speq.model.loaders import load_model as load
    from speq.model.number_format import FormatConfig
    from speq.model.settings import Sampling, Settings
    from speq.model.speculation import Statistics, Step
    from speq.model.transformer import NonFiniteError

    __version__: str

#: The module and the name there of each public name.
_PLACES = {
    "AcceleratorConfig": ("speq.hw.accelerator_config", "AcceleratorConfig"),
    "AxiConfig": ("speq.hw.memory.axi", "AxiConfig"),
    "CheckpointError": ("speq.model.checkpoint", "CheckpointError"),
    "Chunk": ("speq._generation", "Chunk"),
    "EncodedModel": ("speq.model.encoded_file", "EncodedModel"),
    "EngineConfig": ("speq.hw.engine_config", "EngineConfig"),
    "FormatConfig": ("speq.model.number_format", "FormatConfig"),
    "Generation": ("speq._generation", "Generation"),
    "Model": ("speq.model.checkpoint", "Model"),
    "ModelConfig": ("speq.model.checkpoint", "ModelConfig"),
    "NonFiniteError": ("speq.model.transformer", "NonFiniteError"),
    "Report": ("speq.host.inspection", "Report"),
    "Sampling": ("speq.model.settings", "Sampling"),
    "Session": ("speq.host.session", "Session"),
    "Settings": ("speq.model.settings", "Settings"),
    "Statistics": ("speq.model.speculation", "Statistics"),
    "Step": ("speq.model.speculation", "Step"),
    "build_verilog": ("speq._hardware", "build_verilog"),
    "encode": ("speq._models", "encode"),
    "from_transformers": ("speq.model.loaders", "from_transformers"),
    "gemm": ("speq._hardware", "gemm"),
    "generate": ("speq._generation", "generate"),
    "load": ("speq.model.loaders", "load_model"),
    "read_encoded": ("speq._models", "read_encoded"),
    "report": ("speq.host.inspection", "report"),
    "simulate": ("speq._hardware", "simulate"),
    "simulated_session": ("speq._hardware", "simulated_session"),
    "stream": ("speq._generation", "stream"),
    "write_encoded": ("speq._models", "write_encoded"),
}

__all__ = [
    "AcceleratorConfig",
    "AxiConfig",
    "CheckpointError",
    "Chunk",
    "EncodedModel",
    "EngineConfig",
    "FormatConfig",
    "Generation",
    "Model",
    "ModelConfig",
    "NonFiniteError",
    "Report",
    "Sampling",
    "Session",
    "Settings",
    "Statistics",
    "Step",
    "__version__",
    "build_verilog",
    "encode",
    "from_transformers",
    "gemm",
    "generate",
    "load",
    "read_encoded",
    "report",
    "simulate",
    "simulated_session",
    "stream",
    "write_encoded",
]

if not TYPE_CHECKING:  # else a checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        """Load a public name at its first use."""
        if name == "__version__":
            from importlib.metadata import version

            value = version("speq")
        elif name in _PLACES:
            from importlib import import_module

            module, attribute = _PLACES[name]
            value = getattr(import_module(module), attribute)
        else:
            raise AttributeError(f"module 'speq' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
