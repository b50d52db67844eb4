# SPDX-License-Identifier: Apache-2.0
"""Generator of the accelerator's RTL, written in Amaranth."""

from speq.hw.engine_config import EngineConfig, Mode

__all__ = ["EngineConfig", "Mode"]
