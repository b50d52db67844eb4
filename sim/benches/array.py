# SPDX-License-Identifier: Apache-2.0
"""Testbench of the array: tiles of every mode with bubbles, results and the cycle they appear in.

The array has no flow control, so the test plans every cycle beforehand: which step of which tile
enters, and in which cycle which row's results are due.
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
from speq.sim.benches.gemm_engine import Gemm, activation_beats, group_beats, weight_beats
from speq.sim.benches.stimulus import WORD_BITS, config_environment, config_of_test, play
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_TAG_BITS = 6
_TILES = 300
_LARGEST_K = 150


def run(config: EngineConfig) -> None:
    """Check the array of a configuration."""
    array = Array(config, _TAG_BITS)
    ports = _port_places(array)
    widths = {direction: _total_bits(ports[direction]) for direction in Flow}
    connections = [".clk(clk)", ".rst(1'b0)"]
    for direction, vector in ((Flow.In, "stimulus"), (Flow.Out, "observed")):
        connections += [
            f".{name}({vector}[{place} +: {bits}])"
            for name, (place, bits) in ports[direction].items()
        ]
    used = max(place + bits for place, bits in ports[Flow.Out].values())
    top = (
        f"module array_tb (input clk, input [{widths[Flow.In] - 1}:0] stimulus, "
        f"output [{widths[Flow.Out] - 1}:0] observed);\n"
        f"  assign observed[{widths[Flow.Out] - 1}:{used}] = 0;\n"
        f"  array dut ({', '.join(connections)});\nendmodule\n"
    )
    modules = [convert_unit(array, "array")]
    modules += [convert_unit(unit, name, reset=False) for name, unit in array.modules.items()]
    verilog = top + "".join(modules)
    simulate(verilog, "array_tb", __name__, environment=config_environment(config))


def _port_places(array: Array) -> dict[Flow, dict[str, tuple[int, int]]]:
    """Place and width of each port in the stimulus (inputs) and in what is observed (outputs)."""
    places = {Flow.In: {}, Flow.Out: {}}
    for name, member in array.signature.members.items():
        side = places[member.flow]
        start = max((place + bits for place, bits in side.values()), default=0)
        side[name] = start, len(Value.cast(getattr(array, name)))
    return places


def _total_bits(ports: dict[str, tuple[int, int]]) -> int:
    """Bits of a vector that holds these ports, one to spare, in whole words."""
    used = max(place + bits for place, bits in ports.values()) + 1
    return -(-used // WORD_BITS) * WORD_BITS


@cocotb.test()
async def random_tiles(dut: Any) -> None:
    """Results, row, last, half and tag of every tile, in exactly the cycles that are promised."""
    config = config_of_test()
    array = Array(config, _TAG_BITS)
    ports = _port_places(array)
    rng = np.random.default_rng(seed())
    dut._log.info(f"seed {seed()}, {config}")

    stimulus = []
    due = {}  # cycle -> name, golden bits, {row, last, half, tag}
    next_end = 0
    for index in range(_TILES):
        gemm, golden = _random_tile(rng, config)
        tag = int(rng.integers(1 << _TAG_BITS))
        beats = _tile_beats(gemm, config, array, tag)
        bubbles = rng.random() < 0.5
        for step, beat in enumerate(beats):
            while bubbles and rng.random() < 0.3:
                stimulus.append(_bubble(rng, beat))
            if step == len(beats) - 1:
                while len(stimulus) < next_end:  # the buses are busy with the tile before
                    stimulus.append(_bubble(rng, beat))
            stimulus.append(beat)
        tokens = gemm.size[0]
        last_step = len(stimulus) - 1
        next_end = last_step + tokens
        for row in range(tokens):
            details = {"result_row": row, "result_last": int(row == tokens - 1)}
            details |= {"result_half": int(gemm.half), "result_tag": tag}
            name = f"tile {index} {gemm.mode.name.lower()} K={gemm.size[1]}"
            due[last_step + array.LATENCY + row] = name, golden[row], details
    stimulus += [_bubble(rng, stimulus[-1])] * (array.LATENCY + config.rows)

    words = _total_bits(ports[Flow.In]) // WORD_BITS
    packed = np.zeros((len(stimulus), words), "<u8")
    for cycle, beat in enumerate(stimulus):
        vector = sum(value << ports[Flow.In][name][0] for name, value in beat.items())
        packed[cycle] = np.frombuffer(vector.to_bytes(8 * words, "little"), "<u8")
    observed = await play(dut, packed)

    def output(cycle: int, name: str) -> int:
        place, bits = ports[Flow.Out][name]
        return int.from_bytes(observed[cycle].tobytes(), "little") >> place & ((1 << bits) - 1)

    for cycle in range(len(stimulus)):
        valid = output(cycle, "result_valid")
        assert valid == (cycle in due), f"Array.result_valid: cycle {cycle}, got {valid}"
        if cycle not in due:
            continue
        name, golden, details = due[cycle]
        for port, expected in details.items():
            got = output(cycle, port)
            assert got == expected, f"Array.{port}: cycle {cycle}, {name}: {expected=}, {got=}"
        got = output(cycle, "results").to_bytes(4 * config.cols, "little")
        assert_equal_bits(
            f"Array.results, {name}",
            expected=golden,
            got=np.frombuffer(got, np.uint32),
            operands={
                "row": np.array(details["result_row"], np.uint32),
                "column": np.arange(config.cols),
            },
            cycles=np.full(config.cols, cycle),
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
