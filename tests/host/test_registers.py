# SPDX-License-Identifier: Apache-2.0
"""The configuration that an accelerator's constant registers tell."""

from __future__ import annotations

import pytest

from speq.host.registers import configuration, constant_words
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.number_format import FormatConfig

CONFIGS = {
    "usual": AcceleratorConfig(),
    "no vector unit": AcceleratorConfig(lanes=0, query_heads=1024),
    "all different": AcceleratorConfig(
        EngineConfig(3, 64, FormatConfig(32, 1), draft_rows=2, max_k=99, max_o=1234),
        AxiConfig(data_bits=128, address_bits=33),
        AxiConfig(data_bits=64, address_bits=33),
        choices=4,
        history=0,
        lanes=64,
        query_heads=4,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_registers_tell_the_configuration(name):
    config = CONFIGS[name]
    assert configuration(constant_words(config).__getitem__) == config


def test_another_version_is_refused():
    words = constant_words(AcceleratorConfig())
    with pytest.raises(ValueError, match="register VERSION is 0x00010005; expected 0x00010006"):
        configuration((words | {"VERSION": 0x00010005}).__getitem__)
