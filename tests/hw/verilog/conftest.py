# SPDX-License-Identifier: Apache-2.0
"""Generated files for the tests of this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from speq.hw import EngineConfig
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.verilog import write_verilog
from tests.hw.verilog_tools import Generated


@pytest.fixture(scope="session")
def generated(tmp_path_factory) -> Generated:
    """The folder with the files of a configuration, whose names begin with `engine`: generated once
    for all tests. What they change, they copy."""

    @cache
    def generate(config: EngineConfig | AcceleratorConfig) -> Path:
        folder = tmp_path_factory.mktemp("generated")
        write_verilog(config, folder / "engine.v")
        return folder

    return generate
