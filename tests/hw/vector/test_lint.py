# SPDX-License-Identifier: Apache-2.0
"""Lint of the vector unit's arithmetic units, each on its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.vector.activation_quantizer import ActivationQuantizer
from speq.hw.vector.attention_mask import AttentionMask
from speq.hw.vector.block_quantizer import BlockQuantizer
from speq.hw.vector.fp16_to_fp32 import Fp16ToFp32
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_maximum import Fp32Maximum
from speq.hw.vector.fp32_multiplier import Fp32Multiplier
from speq.hw.vector.fp32_to_fp16 import Fp32ToFp16
from speq.hw.vector.lane import Lane, SharedSigmoid
from speq.hw.vector.operand_reader import OperandReader
from speq.hw.vector.operand_requests import OperandRequests
from speq.hw.vector.partial_sums import PartialSums
from speq.hw.vector.reciprocal import Reciprocal
from speq.hw.vector.row_maximum import RowMaximum
from speq.hw.vector.row_values import RowValues
from speq.hw.vector.sigmoid import Exponential, Sigmoid
from speq.hw.vector.token_reader import TokenReader
from speq.hw.vector.vector_writer import VectorWriter
from speq.hw.vector.weight_sum import WeightSum
from speq.hw.vector.word_counter import WordCounter
from tests.hw.verilog_tools import lint, write_unit

CONFIG = AcceleratorConfig()
SMALLEST = AcceleratorConfig(EngineConfig(rows=1, cols=4, max_k=1), lanes=4, query_heads=4)
UNITS = {
    "activation_quantizer": lambda: ActivationQuantizer(CONFIG),
    "smallest_activation_quantizer": lambda: ActivationQuantizer(SMALLEST),
    "attention_mask": lambda: AttentionMask(CONFIG),
    "smallest_attention_mask": lambda: AttentionMask(SMALLEST),
    "block_quantizer": lambda: BlockQuantizer(16, 64),
    "fp16_to_fp32": Fp16ToFp32,
    "fp32_adder": Fp32Adder,
    "fp32_maximum": Fp32Maximum,
    "fp32_multiplier": Fp32Multiplier,
    "fp32_to_fp16": Fp32ToFp16,
    "lane": Lane,
    "partial_sums": lambda: PartialSums(CONFIG, 5, 14, 24),
    "smallest_partial_sums": lambda: PartialSums(SMALLEST, 5, 14, 24),
    "reciprocal_unit": Reciprocal,
    "row_maximum": lambda: RowMaximum(8, 8),
    "row_values": lambda: RowValues(CONFIG),
    "smallest_row_values": lambda: RowValues(SMALLEST),
    "weight_sum": lambda: WeightSum(8, 2048, 8),
    "exponential_unit": Exponential,
    "shared_sigmoid": SharedSigmoid,
    "sigmoid_unit": Sigmoid,  # a module must not be called as its port
    "word_counter": lambda: WordCounter(CONFIG),
    "smallest_word_counter": lambda: WordCounter(SMALLEST),
    "operand_requests": lambda: OperandRequests(CONFIG),
    "operand_reader": lambda: OperandReader(CONFIG),
    "operand_reader_without_halves": lambda: OperandReader(CONFIG, halves=False),
    "smallest_operand_reader": lambda: OperandReader(SMALLEST),
    "token_reader": lambda: TokenReader(CONFIG),
    "smallest_token_reader": lambda: TokenReader(SMALLEST),
    "vector_writer": lambda: VectorWriter(CONFIG),
    "smallest_vector_writer": lambda: VectorWriter(SMALLEST),
}


@pytest.mark.parametrize("name", UNITS)
def test_verilator_lints_it_without_a_warning(name: str, tmp_path: Path) -> None:
    source = write_unit(UNITS[name](), name, tmp_path)
    assert lint(name, source) == (0, "")
