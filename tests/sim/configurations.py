# SPDX-License-Identifier: Apache-2.0
"""Accelerators that several tests simulate: building one takes a minute, and these are few."""

from __future__ import annotations

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig

#: What commands make of `tiny` and small models, with 4 x 8 PEs and by default.
FEW = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=1024), head_inputs=64)
FULL = AcceleratorConfig(EngineConfig(max_k=1024), head_inputs=64)
#: With ports that are narrower than a word of the array, fewer lanes than columns, and a scratch
#: memory that holds but some of what a pass leaves for later.
NARROW = AcceleratorConfig(
    EngineConfig(rows=2, cols=8, max_k=256, max_o=512),
    AxiConfig(data_bits=64),
    AxiConfig(data_bits=64),
    lanes=4,
    scratch=4096,
)
