# SPDX-License-Identifier: Apache-2.0
"""The accelerator's units one by one, for tools that look at each alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from amaranth.lib import wiring

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.array import Array
from speq.hw.array.exponent_remap import ExponentRemap
from speq.hw.array.pe import Pe
from speq.hw.array.rounder import Rounder
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.control.candidate_tiles import CandidateTiles
from speq.hw.control.fp32_gap import Fp32Gap
from speq.hw.control.ngram_matcher import NgramMatcher
from speq.hw.control.program_walker import ProgramWalker
from speq.hw.control.ranker import Ranker
from speq.hw.control.register_file import RegisterFile
from speq.hw.control.run_control import RunControl
from speq.hw.control.speculation_controller import SpeculationController
from speq.hw.memory.activation_reader import ActivationReader
from speq.hw.memory.group_reader import GroupReader
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.memory_watchdog import MemoryWatchdog
from speq.hw.memory.memory_writer import MemoryWriter
from speq.hw.memory.ranking_writer import RankingWriter
from speq.hw.memory.read_arbiter import ReadArbiter
from speq.hw.memory.read_router import ReadRouter
from speq.hw.memory.result_writer import ResultWriter
from speq.hw.memory.scratch_memory import ScratchMemory
from speq.hw.memory.weight_reader import WeightReader
from speq.hw.memory.write_combiner import WriteCombiner
from speq.hw.memory.write_mux import WriteMux
from speq.hw.memory.write_router import WriteRouter
from speq.hw.sampling.gumbel_transform import GumbelTransform
from speq.hw.sampling.noise_source import NoiseSource
from speq.hw.sampling.perturber import Perturber
from speq.hw.sampling.philox import Philox
from speq.hw.vector.activation_quantizer import ActivationQuantizer
from speq.hw.vector.attention_mask import AttentionMask
from speq.hw.vector.block_quantizer import BlockQuantizer
from speq.hw.vector.entry_mover import EntryMover
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
from speq.hw.vector.run_planner import RunPlanner
from speq.hw.vector.sigmoid import Exponential, Sigmoid
from speq.hw.vector.token_reader import TokenReader
from speq.hw.vector.transposer import Transposer
from speq.hw.vector.vector_core import VectorCore
from speq.hw.vector.vector_writer import VectorWriter
from speq.hw.vector.weight_sum import WeightSum
from speq.hw.vector.word_counter import WordCounter
from speq.hw.verilog.generate import convert_unit

#: Units that have instances of others.
COMPOSED = ("array", "vector_core")
#: Lanes of the vector unit, if the configuration has none.
_LANES = 8
#: Cycles that the vector unit's sums wait for operands, results and factors.
_PAUSES = (5, 14, 24)
#: Masters that share a port.
_MASTERS = 3
#: Bytes of the scratch memory, less than by default: an FPGA of medium size holds them.
_SCRATCH = 1 << 16
#: Of the ports to memory.
_ADDRESS_CHANNELS = 3


def units(config: AcceleratorConfig) -> dict[str, Callable[[], wiring.Component]]:
    """What makes each unit, by name, from the array outwards.

    Units that are no more than a few others connected are not among them. Those of the vector unit
    are, but for more rows than columns, also if the configuration has no lanes.
    """
    engine = config.engine
    array: dict[str, Callable[[], wiring.Component]] = {
        "exponent_remap": lambda: ExponentRemap(engine),
        "pe_dual": lambda: Pe(engine, draft=True),
        "pe_fp16": lambda: Pe(engine, draft=False),
        "rounder": lambda: Rounder(engine),
        "array": lambda: Array(engine, 1),
    }
    memory: dict[str, Callable[[], wiring.Component]] = {
        "weight_reader": lambda: WeightReader(config),
        "group_reader": lambda: GroupReader(config),
        "activation_reader": lambda: ActivationReader(config),
        "memory_reader": lambda: MemoryReader(config.data),
        "read_arbiter": lambda: ReadArbiter(config.data, _MASTERS),
        "read_router": lambda: ReadRouter(config.data, _SCRATCH),
        "write_router": lambda: WriteRouter(config.data, _SCRATCH),
        "scratch_memory": lambda: ScratchMemory(config.data, _SCRATCH),
        "result_writer": lambda: ResultWriter(config),
        "ranking_writer": lambda: RankingWriter(config),
        "write_mux": lambda: WriteMux(config.data, _MASTERS),
        "memory_writer": lambda: MemoryWriter(config.data),
        "memory_watchdog": lambda: MemoryWatchdog(_ADDRESS_CHANNELS),
        "write_combiner": lambda: WriteCombiner(config.data),
    }
    control: dict[str, Callable[[], wiring.Component]] = {
        "register_file": lambda: RegisterFile(config),
        "run_control": lambda: RunControl(config),
        "program_walker": lambda: ProgramWalker(config),
        "candidate_tiles": lambda: CandidateTiles(config),
        "ranker": lambda: Ranker(config),
        "speculation_controller": lambda: SpeculationController(config),
        "fp32_gap": Fp32Gap,
    }
    if config.history:
        control["ngram_matcher"] = lambda: NgramMatcher(config)
    sampling: dict[str, Callable[[], wiring.Component]] = {
        "philox": lambda: Philox(config.noise_rounds),
        "gumbel_transform": GumbelTransform,
        "noise_source": lambda: NoiseSource(config),
        "perturber": lambda: Perturber(config),
    }
    vector: dict[str, Callable[[], wiring.Component]] = {
        "fp32_adder": Fp32Adder,
        "fp32_multiplier": Fp32Multiplier,
        "fp32_maximum": Fp32Maximum,
        "fp32_to_fp16": Fp32ToFp16,
        "fp16_to_fp32": Fp16ToFp32,
        "exponential": Exponential,
        "sigmoid": Sigmoid,
        "shared_sigmoid": SharedSigmoid,
        "reciprocal": Reciprocal,
        "lane": Lane,
        "row_maximum": lambda: RowMaximum(_LANES, engine.rows),
        "block_quantizer": lambda: BlockQuantizer(_LANES, engine.format.group),
        "entry_mover": lambda: EntryMover(config),
        "weight_sum": lambda: WeightSum(_LANES, engine.max_k, engine.rows),
    }
    if engine.rows <= engine.cols:
        lanes = config.lanes or min(_LANES, engine.cols)
        with_lanes = replace(config, lanes=lanes)
        vector |= {
            "vector_core": lambda: VectorCore(with_lanes),
            "word_counter": lambda: WordCounter(with_lanes),
            "operand_requests": lambda: OperandRequests(with_lanes),
            "operand_reader": lambda: OperandReader(with_lanes),
            "run_planner": lambda: RunPlanner(with_lanes),
            "transposer": lambda: Transposer(with_lanes),
            "vector_writer": lambda: VectorWriter(with_lanes),
            "activation_quantizer": lambda: ActivationQuantizer(with_lanes),
            "token_reader": lambda: TokenReader(with_lanes),
            "attention_mask": lambda: AttentionMask(with_lanes),
            "partial_sums": lambda: PartialSums(with_lanes, *_PAUSES),
            "row_values": lambda: RowValues(with_lanes),
        }
    return array | memory | control | sampling | vector


def unit_verilog(unit: wiring.Component, name: str, *, boxes: bool = False) -> str:
    """Verilog of a unit as the module `name`, and of what it has instances of; with `boxes` of
    modules that are units of their own, such as lanes, only the ports."""
    text = convert_unit(unit, name)
    for module, component in getattr(unit, "modules", {}).items():
        inner = convert_unit(component, module, reset=False)
        if boxes:
            inner = re.sub(rf"(?m)^module {module}\b", r"(* blackbox *)\n\g<0>", inner)
        text += inner
    return RAM_VERILOG * ("speq_ram" in text) + text
