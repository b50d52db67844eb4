# SPDX-License-Identifier: Apache-2.0
"""Generator of the accelerator's RTL, written in Amaranth."""

from speq.hw.config import AcceleratorConfig, Mode

__all__ = ["AcceleratorConfig", "Mode"]
