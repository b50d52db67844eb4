# SPDX-License-Identifier: Apache-2.0
"""Testbench of the array: tiles of every mode with bubbles, results and the cycle they appear in.

The array has no flow control, so the test plans every cycle beforehand: which step of which tile
enters, and in which cycle which row's results are due. The design under test holds arrays of
several configurations side by side, as building a design takes long.
"""

from __future__ import annotations

from typing import Any

import cocotb
import numpy as np
import torch
from amaranth.hdl import Value
from amaranth.lib.wiring import Flow

from speq.hw.array.array import Array
from speq.hw.engine_config import EngineConfig, Mode
from speq.hw.verilog import convert_unit
from speq.model.arith import draft_gemm, quantize_activations, to_float16, verify_gemm
from speq.model.format import encode
from speq.model.number_format import FormatConfig
from speq.sim.benches.gemm_engine import Gemm, activation_beats, group_beats, weight_beats
from speq.sim.benches.stimulus import WORD_BITS, pad, play
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_CONFIGS = {
    "one_row_drafts": EngineConfig(rows=3, cols=2, max_k=200),
    "all_rows_draft": EngineConfig(
        rows=2, cols=3, draft_rows=2, max_k=200, format=FormatConfig(32, 0)
    ),
    "baseline": EngineConfig(rows=4, cols=1, draft_rows=0, max_k=200),
    "one_pe": EngineConfig(rows=1, cols=1, max_k=200),
}
_TAG_BITS = 6
_TILES = 300
_LARGEST_K = 150


def run() -> None:
    """Check the arrays of several configurations."""
    instances, modules = [], []
    start = {Flow.In: 0, Flow.Out: 0}
    for name, config in _CONFIGS.items():
        array = Array(config, _TAG_BITS)
        ports = _port_places(array)
        connections = [".clk(clk)", ".rst(1'b0)"]
        for direction, vector in ((Flow.In, "stimulus"), (Flow.Out, "observed")):
            connections += [
                f".{port}({vector}[{start[direction] + place} +: {bits}])"
                for port, (place, bits) in ports[direction].items()
            ]
            start[direction] += _total_bits(ports[direction])
        used = start[Flow.Out] - _total_bits(ports[Flow.Out]) + _used_bits(ports[Flow.Out])
        instances += [
            f"  assign observed[{start[Flow.Out] - 1}:{used}] = 0;\n",
            f"  array_{name} {name} ({', '.join(connections)});\n",
        ]
        units = [convert_unit(array, f"array_{name}")]
        units += [
            convert_unit(unit, unit_name, reset=False) for unit_name, unit in array.modules.items()
        ]
        # Other configurations have other units of these names.
        modules += [unit.replace("speq_", f"{name}_") for unit in units]
    top = (
        f"module array_tb (input clk, input [{start[Flow.In] - 1}:0] stimulus, "
        f"output [{start[Flow.Out] - 1}:0] observed);\n{''.join(instances)}endmodule\n"
    )
    simulate(top + "".join(modules), "array_tb", __name__)


def _port_places(array: Array) -> dict[Flow, dict[str, tuple[int, int]]]:
    """Place and width of each port in the stimulus (inputs) and in what is observed (outputs)."""
    places = {Flow.In: {}, Flow.Out: {}}
    for name, member in array.signature.members.items():
        side = places[member.flow]
        start = max((place + bits for place, bits in side.values()), default=0)
        side[name] = start, len(Value.cast(getattr(array, name)))
    return places


def _used_bits(ports: dict[str, tuple[int, int]]) -> int:
    """Bits of these ports side by side."""
    return max(place + bits for place, bits in ports.values())


def _total_bits(ports: dict[str, tuple[int, int]]) -> int:
    """Bits of a vector that holds these ports, one to spare, in whole words."""
    return -(-(_used_bits(ports) + 1) // WORD_BITS) * WORD_BITS


@cocotb.test()
async def random_tiles(dut: Any) -> None:
    """Results, row, last, half and tag of every tile, in exactly the cycles that are promised."""
    cases = []
    for name, config in _CONFIGS.items():
        dut._log.info(f"seed {seed()}, {name}: {config}")
        cases.append(_Case(name, config))
    cycles = max(len(case.stimulus) for case in cases)
    stimulus = [pad(case.stimulus, cycles) for case in cases]
    observed = await play(dut, np.concatenate(stimulus, axis=1))
    start = 0
    for case in cases:
        end = start + _total_bits(case.ports[Flow.Out]) // WORD_BITS
        case.check(observed[: len(case.stimulus), start:end])
        start = end


class _Case:
    """The tiles of the array of a configuration.

    Attributes
    ----------
    stimulus : uint64 array [cycles, words]
    due : what should come out in a cycle: name of the tile, golden bits, and other ports' values
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name, self.config = name, config
        array = Array(config, _TAG_BITS)
        self.ports = _port_places(array)
        rng = np.random.default_rng(seed())
        beats_in: list[dict] = []
        self.due: dict[int, tuple[str, np.ndarray, dict[str, int]]] = {}
        next_end = 0
        for index in range(_TILES):
            gemm, golden = _random_tile(rng, config)
            tag = int(rng.integers(1 << _TAG_BITS))
            beats = _tile_beats(gemm, config, array, tag)
            bubbles = rng.random() < 0.5
            for step, beat in enumerate(beats):
                while bubbles and rng.random() < 0.3:
                    beats_in.append(_bubble(rng, beat))
                if step == len(beats) - 1:
                    while len(beats_in) < next_end:  # the buses are busy with the tile before
                        beats_in.append(_bubble(rng, beat))
                beats_in.append(beat)
            tokens = gemm.size[0]
            last_step = len(beats_in) - 1
            next_end = last_step + tokens
            for row in range(tokens):
                details = {"result_row": row, "result_last": int(row == tokens - 1)}
                details |= {"result_half": int(gemm.half), "result_tag": tag}
                tile = f"tile {index} {gemm.mode.name.lower()} K={gemm.size[1]}"
                self.due[last_step + array.LATENCY + row] = tile, golden[row], details
        beats_in += [_bubble(rng, beats_in[-1])] * (array.LATENCY + config.rows)

        inputs = self.ports[Flow.In]
        words = _total_bits(inputs) // WORD_BITS
        self.stimulus = np.zeros((len(beats_in), words), "<u8")
        for cycle, beat in enumerate(beats_in):
            vector = sum(value << inputs[port][0] for port, value in beat.items())
            self.stimulus[cycle] = np.frombuffer(vector.to_bytes(8 * words, "little"), "<u8")

    def check(self, observed: np.ndarray) -> None:
        """Compare what was observed, uint64 [cycles, words]."""
        cols = self.config.cols

        def output(cycle: int, port: str) -> int:
            place, bits = self.ports[Flow.Out][port]
            return int.from_bytes(observed[cycle].tobytes(), "little") >> place & ((1 << bits) - 1)

        for cycle in range(len(observed)):
            due = cycle in self.due
            valid = output(cycle, "result_valid")
            assert valid == due, f"Array.result_valid, {self.name}: cycle {cycle}, got {valid}"
            if not due:
                continue
            tile, golden, details = self.due[cycle]
            for port, expected in details.items():
                got = output(cycle, port)
                assert got == expected, (
                    f"Array.{port}, {self.name}: cycle {cycle}, {tile}: {expected=}, {got=}"
                )
            got = output(cycle, "results").to_bytes(4 * cols, "little")
            assert_equal_bits(
                f"Array.results, {self.name}, {tile}",
                expected=golden,
                got=np.frombuffer(got, np.uint32),
                operands={
                    "row": np.array(details["result_row"], np.uint32),
                    "column": np.arange(cols),
                },
                cycles=np.full(cols, cycle),
            )


def _random_tile(rng: np.random.Generator, config: EngineConfig) -> tuple[Gemm, np.ndarray]:
    """A GEMM of one tile and its golden output bits, uint32 [T, cols]."""
    modes = list(Mode) if config.draft_rows else [Mode.BYPASS]
    mode = modes[rng.integers(len(modes))]
    rows = config.draft_rows if mode is Mode.DRAFT else config.rows
    tokens = int(rng.integers(1, rows + 1))
    k = int(rng.choice([1, 2, 5, int(rng.integers(1, _LARGEST_K))]))
    spread = rng.choice([0.05, 1, 1000])
    x = torch.from_numpy(rng.normal(0, spread, (tokens, k)).astype(np.float16))
    w = torch.from_numpy(rng.normal(0, 1, (config.cols, k)).astype(np.float16))
    if rng.random() < 0.1:
        x[rng.integers(tokens), rng.integers(k)] = float("inf")
    half = bool(rng.integers(2))
    if mode is Mode.BYPASS:
        gemm, golden = Gemm(x, w, half), verify_gemm(x, w)
    else:
        encoded = encode(w, config.format, columns=config.cols)
        if mode is Mode.VERIFY:
            gemm, golden = Gemm(x, encoded, half), verify_gemm(x, w)
        else:
            blocks = quantize_activations(x, config.format.group)
            gemm, golden = Gemm(blocks, encoded, half), draft_gemm(blocks, encoded)
    if half:
        return gemm, to_float16(golden).numpy().view(np.uint16).astype(np.uint32)
    return gemm, golden.numpy().view(np.uint32)


def _tile_beats(gemm: Gemm, config: EngineConfig, array: Array, tag: int) -> list[dict]:
    """The inputs of the steps of a tile."""
    control = array.control.shape()
    groups = group_beats(gemm, config.cols)
    per_group = config.format.group // (4 if gemm.mode is Mode.DRAFT else 1)
    beats = []
    words = weight_beats(gemm, config.cols)
    for step, (activations, weights) in enumerate(
        zip(activation_beats(gemm, config), words, strict=True)
    ):
        fields = {
            "valid": 1,
            "mode": gemm.mode.value,
            "first": int(step == 0),
            "last": int(step == len(words) - 1),
            "tokens": gemm.size[0],
            "half": int(gemm.half),
            "tag": tag,
        }
        beat = {
            "control": sum(value << control[name].offset for name, value in fields.items()),
            "activations": activations,
            "weights": int.from_bytes(weights.astype("<u2").tobytes(), "little"),
        }
        if config.draft_rows:
            row = groups[step // per_group] if len(groups) else np.zeros(config.cols, np.uint8)
            beat["groups"] = int.from_bytes(row.tobytes(), "little")
        beats.append(beat)
    return beats


def _bubble(rng: np.random.Generator, beat: dict) -> dict:
    """A step that must change nothing, whatever its other inputs are."""
    garbage = {name: int(rng.integers(1 << 62)) for name in ("activations", "weights", "groups")}
    masks = {name: (1 << max(beat[name].bit_length(), 1)) - 1 for name in beat}
    control = int(rng.integers(masks["control"] + 1)) & ~1  # `valid` is the lowest bit
    return {name: control if name == "control" else garbage[name] & masks[name] for name in beat}
