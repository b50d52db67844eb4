# SPDX-License-Identifier: Apache-2.0
"""Named configurations of the accelerator for `speq verilog` and `speq image`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A configuration: what it is for, and the options of `speq verilog` that make it."""

    purpose: str
    options: dict[str, int]


PRESETS = {
    "small": Preset(
        "4 x 8, 128-bit ports: quick to simulate, and a small beginning on an FPGA",
        {"rows": 4, "cols": 8},
    ),
    "default": Preset(
        "8 x 16, 256-bit ports: what is written without any option", {"rows": 8, "cols": 16}
    ),
    "smollm2": Preset(
        "8 x 32, 512-bit ports: the array of make demo-smollm2", {"rows": 8, "cols": 32}
    ),
    "wide": Preset(
        "8 x 64, 1024-bit ports: K and context up to 16,384, for larger models",
        {"rows": 8, "cols": 64, "max_k": 16_384},
    ),
}


def complete_preset(incomplete: str) -> list[tuple[str, str]]:
    """Names that begin so, and what they are for, for shells."""
    return [(name, p.purpose) for name, p in PRESETS.items() if name.startswith(incomplete)]


def presets_help() -> str:
    """What the names stand for, a paragraph each."""
    lines = (f"{name}: {preset.purpose}." for name, preset in PRESETS.items())
    return "\n\n".join(("Presets:", *lines))
