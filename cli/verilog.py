# SPDX-License-Identifier: Apache-2.0
"""`speq verilog`: write the accelerator's Verilog, or the engine's, and the files beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from speq.hw import EngineConfig
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog import write_verilog


@dataclass(frozen=True)
class Ports:
    """Widths in bits of the accelerator's AXI ports; None is the default of `AcceleratorConfig`."""

    weights: int | None
    data: int | None
    address: int


def system_config(engine: EngineConfig, ports: Ports) -> AcceleratorConfig:
    """The accelerator's configuration. Raises ValueError if a parameter is not allowed."""
    default = AcceleratorConfig(engine)
    weights, data = (
        AxiConfig(data_bits=given or port.data_bits, address_bits=ports.address)
        for given, port in ((ports.weights, default.weights), (ports.data, default.data))
    )
    return AcceleratorConfig(engine, weights=weights, data=data)


def run(output: Path, engine: EngineConfig, ports: Ports | None) -> None:
    """Write `output` and what goes with it, and print what was written.

    Without `ports` it is the engine alone.

    Raises
    ------
    ValueError
        If a parameter is not allowed.
    OSError
        If a file cannot be written.
    """
    config = engine if ports is None else system_config(engine, ports)
    for path in write_verilog(config, output):
        print(f"{path}  {path.stat().st_size:,} bytes")
