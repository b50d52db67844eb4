# SPDX-License-Identifier: Apache-2.0
"""Running GEMMs on the simulated engine at full speed.

The design under test is the engine with sources and a sink in Verilog, which read and write
files, so that Python does not run once per cycle. `run_gemms` takes tensors and gives tensors.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from speq.host.layout import pack_block_activations
from speq.hw.array.gemm_engine import command_layout, result_layout
from speq.hw.engine_config import (
    DRAFT_LANES,
    EngineConfig,
    Mode,
)
from speq.hw.verilog import TOP, generate_verilog
from speq.model.arith import BlockActivations
from speq.model.format import EncodedTensor
from speq.sim.builder import SimulationError
from speq.sim.runner import simulate

#: Cycles without a result after which a simulation is given up, beyond what the jobs need.
_PATIENCE = 10_000
#: What clocks the design; the simulator imports it, and nothing heavy with it.
_IN_SIMULATOR = "speq.sim.benches.gemm_engine_clock"


@dataclass(frozen=True)
class Gemm:
    """One GEMM for the engine.

    Attributes
    ----------
    activations : torch.float16 [T, K] (verify, bypass) or BlockActivations (draft)
    weights : EncodedTensor (verify, draft) or torch.float16 [O, K] (bypass)
    half : bool
        Ask for FP16 results.
    name : str
        For reports.
    """

    activations: torch.Tensor | BlockActivations
    weights: EncodedTensor | torch.Tensor
    half: bool = False
    name: str = "gemm"

    @property
    def mode(self) -> Mode:
        """The engine's mode for these operands."""
        if isinstance(self.activations, BlockActivations):
            return Mode.DRAFT
        return Mode.VERIFY if isinstance(self.weights, EncodedTensor) else Mode.BYPASS

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, K, O)."""
        x = self.activations
        tokens, k = (x.mantissa if isinstance(x, BlockActivations) else x).shape
        return tokens, k, self.weights.shape[0]

    @property
    def steps(self) -> int:
        """Weight words per column and tile."""
        _, k, _ = self.size
        return -(-k // DRAFT_LANES) if self.mode is Mode.DRAFT else k


@dataclass(frozen=True)
class GemmResult:
    """What the engine answered.

    Attributes
    ----------
    output : numpy.uint32 [T, O]
        Bit patterns, FP16 zero-extended.
    command, start, end : int
        Cycles in which the command, the first weight word and the last result were taken.
    """

    output: np.ndarray
    command: int
    start: int
    end: int

    @property
    def values(self) -> np.ndarray:
        """The output as numpy.float32 [T, O]; not of FP16 results."""
        return self.output.view(np.float32)

    @property
    def cycles(self) -> int:
        """From the first weight word to the last result."""
        return self.end - self.start + 1


@dataclass(frozen=True)
class RunResult:
    """Results of a run.

    Attributes
    ----------
    results : list of GemmResult
    cycles : int
    cycles_per_second : float
        Speed of the simulation, in wall time.
    nonfinite : bool
        The engine's sticky flag.
    latencies : dict
        The engine's, as in the JSON beside the Verilog.
    """

    results: list[GemmResult]
    cycles: int
    cycles_per_second: float
    nonfinite: bool
    latencies: dict[str, int]


def weight_beats(gemm: Gemm, columns: int) -> np.ndarray:
    """Words for the engine, uint16 [beats, columns]."""
    weights = gemm.weights
    if isinstance(weights, EncodedTensor):
        if weights.columns != columns:
            raise ValueError(
                f"{weights.name!r} is laid out for {weights.columns} columns; the engine has "
                f"{columns}: encode it with columns={columns}"
            )
        words = weights.draft_plane if gemm.mode is Mode.DRAFT else weights.verify_words()
        return words.reshape(-1, columns)
    patterns = weights.contiguous().numpy().view(np.uint16)
    patterns = np.pad(patterns, ((0, -len(patterns) % columns), (0, 0)))
    return patterns.reshape(-1, columns, patterns.shape[1]).transpose(0, 2, 1).reshape(-1, columns)


def group_beats(gemm: Gemm, columns: int) -> np.ndarray:
    """Group bytes for the engine, uint8 [beats, columns]."""
    if gemm.mode is Mode.BYPASS:
        return np.empty((0, columns), np.uint8)
    assert isinstance(gemm.weights, EncodedTensor), "drafts need encoded weights"
    return gemm.weights.group_bytes.reshape(-1, columns)


def activation_beats(gemm: Gemm, config: EngineConfig) -> list[int]:
    """Words for the activation store, one integer a beat."""
    x = gemm.activations
    if isinstance(x, BlockActivations):
        words = pack_block_activations(x)
    else:
        words = x.contiguous().numpy().view(np.uint16).T
    return [int.from_bytes(word.tobytes(), "little") for word in words]


def command_word(
    config: EngineConfig, mode: Mode | int, k: int, o: int, tokens: int, half: bool = False
) -> int:
    """The payload of a command."""
    layout = command_layout(config)
    number = mode.value if isinstance(mode, Mode) else mode
    values = {"mode": number, "k": k, "o": o, "tokens": tokens}
    values["half"] = int(half)
    return sum(value << layout[name].offset for name, value in values.items())


@cache
def _harness(config: EngineConfig) -> tuple[str, dict[str, int]]:
    """Verilog of the engine between file-driven sources and a file-writing sink, and latencies."""
    engine_verilog, description = generate_verilog(config)
    widths = {port["name"]: port["width"] for port in description["ports"]}
    payloads = {name: widths[f"{name}__payload"] for name in _sources(config)}
    # Whole bytes; the bit above the weights marks the first word of a GEMM.
    file_bits = {
        name: -(-(width + (name == "weights")) // 8) * 8 for name, width in payloads.items()
    }
    connections = "".join(
        f"    .{name}__payload({name}_data[{width - 1}:0]), .{name}__valid({name}_valid), "
        f".{name}__ready({name}_ready),\n"
        for name, width in payloads.items()
    )
    top = _TOP.format(
        sources="".join(_SOURCE.format(name=name, width=file_bits[name]) for name in payloads),
        idle=" && ".join(f"{name}_left == 0 && !{name}_valid" for name in payloads),
        engine=TOP,
        connections=connections,
        result_width=widths["results__payload"],
        first=f"weights_data[{payloads['weights']}]",
    )
    return top + engine_verilog, description["latencies"]


def _sources(config: EngineConfig) -> list[str]:
    groups = ["groups"] if config.draft_rows else []
    return ["command", "activations", "weights", *groups]


# $fread fills a register from its most significant byte; a file holds big-endian beats.
_SOURCE = """
  integer {name}_file, {name}_count;
  reg [1023:0] {name}_path;
  reg [{width}-1:0] {name}_data, {name}_next;
  reg [31:0] {name}_left, {name}_random, {name}_stall;
  reg {name}_valid;
  wire {name}_ready;
  initial begin
    {name}_valid = 0;
    if (!$value$plusargs("{name}_beats=%d", {name}_left)) {name}_left = 0;
    if (!$value$plusargs("{name}_stall=%d", {name}_stall)) {name}_stall = 0;
    if (!$value$plusargs("{name}_seed=%d", {name}_random)) {name}_random = 1;
    if ($value$plusargs("{name}_file=%s", {name}_path)) {name}_file = $fopen({name}_path, "rb");
  end
  always @(posedge clk) begin
    {name}_random <= {name}_random[0] ? ({name}_random >> 1) ^ 32'h80200003 : {name}_random >> 1;
    if (!rst && (!{name}_valid || {name}_ready)) begin
      if ({name}_left != 0 && {name}_random[7:0] >= {name}_stall[7:0]) begin
        {name}_count = $fread({name}_next, {name}_file);
        {name}_data <= {name}_next;
        {name}_valid <= 1;
        {name}_left <= {name}_left - 1;
      end else {name}_valid <= 0;
    end
  end
"""

_TOP = """\
module gemm_bench (
  input clk, input rst, output reg done, output idle, output nonfinite, output rejected,
  output reg [31:0] cycle
);
{sources}
  integer results_file, starts_file;
  reg [1023:0] results_path, starts_path;
  reg [31:0] results_left, results_random, results_stall;
  wire [{result_width}-1:0] results_data;
  wire results_valid, busy;
  wire results_ready = results_random[7:0] >= results_stall[7:0];
  assign idle = {idle} && !busy;
  initial begin
    done = 0;
    cycle = 0;
    if (!$value$plusargs("results_beats=%d", results_left)) results_left = 0;
    if (!$value$plusargs("results_stall=%d", results_stall)) results_stall = 0;
    if (!$value$plusargs("results_seed=%d", results_random)) results_random = 1;
    if ($value$plusargs("results_file=%s", results_path)) results_file = $fopen(results_path, "w");
    if ($value$plusargs("starts_file=%s", starts_path)) starts_file = $fopen(starts_path, "w");
  end
  always @(posedge clk) begin
    cycle <= cycle + 1;
    results_random <= results_random[0] ? (results_random >> 1) ^ 32'h80200003
                                        : results_random >> 1;
    if (!rst && command_valid && command_ready) $fwrite(starts_file, "command %h\\n", cycle);
    if (!rst && weights_valid && weights_ready && {first})
      $fwrite(starts_file, "weights %h\\n", cycle);
    if (!rst && results_valid && results_ready) begin
      $fwrite(results_file, "%h %h\\n", cycle, results_data);
      results_left <= results_left - 1;
      if (results_left == 1) done <= 1;
    end
    if (done && idle) begin
      $fflush(results_file);
      $fflush(starts_file);
    end
  end
  {engine} engine (
    .clk(clk), .rst(rst), .clear(1'b0), .busy(busy), .nonfinite(nonfinite), .rejected(rejected),
{connections}    .results__payload(results_data), .results__valid(results_valid),
    .results__ready(results_ready)
  );
endmodule
"""


def run_gemms(
    config: EngineConfig,
    gemms: Sequence[Gemm],
    *,
    impossible: Sequence[int] = (),
    stalls: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> RunResult:
    """Run GEMMs one after another on the simulated engine.

    Parameters
    ----------
    config : EngineConfig
    gemms : sequence of Gemm
    impossible : sequence of int
        Command words that come first and that the engine must drop.
    stalls : dict, optional
        For any of the streams "command", "activations", "weights", "groups", "results" the
        probability, in 256ths, that it stalls in a cycle; 0 when not given.
    seed : int
        Of the stalls.
    progress : callable, optional
        Called, from another thread, with the share of the results that is there.

    Returns
    -------
    RunResult

    Raises
    ------
    SimulationError
        If the simulation cannot be built, does not end, or gives a beat too many, too few or of
        the wrong place.
    """
    stalls = dict(stalls or {})
    source, latencies = _harness(config)
    with tempfile.TemporaryDirectory(prefix="speq-") as folder:
        files = Path(folder)
        counts = _write_beats(files, config, gemms, impossible)
        counts["results"] = sum(_tiles(gemm, config) * gemm.size[0] for gemm in gemms)
        plusargs = [f"+starts_file={files / 'starts'}", f"+results_file={files / 'results'}"]
        for number, (name, count) in enumerate(counts.items()):
            random = (seed * 8 + number + 1) * 2654435761 % 2**32 | 1
            plusargs += [f"+{name}_beats={count}", f"+{name}_seed={random}"]
            plusargs += [f"+{name}_stall={stalls.get(name, 0)}"]
            if name != "results":
                plusargs.append(f"+{name}_file={files / name}")
        busy = sum(max(g.steps, g.size[0]) * _tiles(g, config) + g.steps for g in gemms)
        slowest = 256 / (256 - max(stalls.values(), default=0))
        limit = int((busy + counts["results"]) * slowest * 4) + _PATIENCE
        line = 8 + 1 + -(-result_layout(config).size // 4) + 1  # of the results file
        with _watch(files / "results", counts["results"] * line, progress):
            run = simulate(
                source,
                "gemm_bench",
                _IN_SIMULATOR,
                environment={"SPEQ_CYCLE_LIMIT": str(limit)},
                plusargs=plusargs,
            )
        report = json.loads((run / "report.json").read_text())
        if not (report["done"] and report["idle"]) or report["rejected"] != bool(impossible):
            raise SimulationError(f"the engine stopped after {report['cycles']} cycles: {report}")
        starts = _cycles(files / "starts", "weights")
        commands = _cycles(files / "starts", "command")[len(impossible) :]
        beats = (files / "results").read_text().splitlines()
    results = _collect(config, gemms, commands, starts, beats)
    speed = report["cycles_per_second"]
    return RunResult(results, report["cycles"], speed, report["nonfinite"], latencies)


@contextmanager
def _watch(path: Path, final_size: int, progress: Callable[[float], None] | None) -> Iterator[None]:
    """Report how much of a file has been written, as long as the context lasts."""
    if progress is None:
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            if path.exists():
                progress(path.stat().st_size / final_size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tiles(gemm: Gemm, config: EngineConfig) -> int:
    return -(-gemm.size[2] // config.cols)


def _write_beats(
    folder: Path, config: EngineConfig, gemms: Sequence[Gemm], impossible: Sequence[int]
) -> dict[str, int]:
    """Write the sources' files; returns the number of beats of each."""
    columns = config.cols
    commands = [*impossible] + [
        command_word(config, gemm.mode, k, o, tokens, gemm.half)
        for gemm in gemms
        for tokens, k, o in [gemm.size]
    ]
    activations = [beat for gemm in gemms for beat in activation_beats(gemm, config)]
    words = [weight_beats(gemm, columns) for gemm in gemms]
    groups = np.concatenate([group_beats(gemm, columns) for gemm in gemms])
    marks = np.concatenate([np.arange(len(beats)) == 0 for beats in words]).astype(np.uint8)
    # Big-endian: the mark, then the columns from the last to the first.
    weights = np.concatenate(words)[:, ::-1].astype(">u2", order="C").view(np.uint8)
    contents = {
        "command": _to_bytes(commands, command_layout(config).size),
        "activations": _to_bytes(activations, config.activation_layout.size),
        "weights": np.concatenate([marks[:, None], weights], axis=1).tobytes(),
        "groups": groups[:, ::-1].tobytes(),
    }
    counts = dict(zip(contents, map(len, (commands, activations, weights, groups)), strict=True))
    for name in _sources(config):
        (folder / name).write_bytes(contents[name])
    return {name: counts[name] for name in _sources(config)}


def _to_bytes(beats: list[int], bits: int) -> bytes:
    return b"".join(beat.to_bytes(-(-bits // 8), "big") for beat in beats)


def _cycles(path: Path, event: str) -> list[int]:
    """The cycles of one kind of event in a file of lines "event cycle"."""
    lines = (line.split() for line in path.read_text().splitlines())
    return [int(cycle, 16) for kind, cycle in lines if kind == event]


def _collect(
    config: EngineConfig,
    gemms: Sequence[Gemm],
    commands: list[int],
    starts: list[int],
    beats: list[str],
) -> list[GemmResult]:
    """Put the result beats together, checking that each is the one that is due."""
    layout = result_layout(config)
    offsets = {name: layout[name].offset for name in layout.members}
    data_bytes = 4 * config.cols
    results = []
    position = 0
    for gemm, command, start in zip(gemms, commands, starts, strict=True):
        tokens, _, o = gemm.size
        tiles = _tiles(gemm, config)
        output = np.empty((tokens, tiles, config.cols), np.uint32)
        end = start
        for tile in range(tiles):
            valid = min(config.cols, o - tile * config.cols)
            for row in range(tokens):
                cycle, text = beats[position].split()
                end, beat = int(cycle, 16), int(text, 16)
                is_last = tile == tiles - 1 and row == tokens - 1
                expected = (
                    ((1 << valid) - 1) << offsets["strobe"]
                    | row << offsets["row"]
                    | is_last << offsets["last"]
                )
                if beat >> 8 * data_bytes != expected >> 8 * data_bytes:
                    raise SimulationError(
                        f"{gemm.name}: result beat {position} has strobe, row and last "
                        f"{beat >> 8 * data_bytes:#x}; expected {expected >> 8 * data_bytes:#x}"
                    )
                data = (beat & ((1 << 8 * data_bytes) - 1)).to_bytes(data_bytes, "little")
                output[row, tile] = np.frombuffer(data, np.uint32)
                position += 1
        output = output.reshape(tokens, -1)[:, :o]
        results.append(GemmResult(output, command, start, end))
    if position != len(beats):
        raise SimulationError(f"{len(beats)} result beats; expected {position}")
    return results
