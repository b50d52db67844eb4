# SPDX-License-Identifier: Apache-2.0
"""What is written for other tools: Verilog, register maps, core file, testbench and example."""

from speq.hw.verilog.description import read_description
from speq.hw.verilog.generate import (
    ACCELERATOR_TOP,
    TOP,
    accelerator_files,
    convert_unit,
    generate_top,
    generate_verilog,
    write_verilog,
)
from speq.hw.verilog.package import LINT_WAIVERS

__all__ = [
    "ACCELERATOR_TOP",
    "LINT_WAIVERS",
    "TOP",
    "accelerator_files",
    "convert_unit",
    "generate_top",
    "generate_verilog",
    "read_description",
    "write_verilog",
]
