# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `speq bench`.

A benchmark is a function from settings to figures; adding one is adding its name to
`speq.cli.bench.NAMES`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from speq.cli.area import column_overhead, pe_overhead, unit_areas
from speq.cli.vector_bench import POSITION, measure, shapes
from speq.host.session import Session
from speq.hw import EngineConfig
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.verilog import write_verilog
from speq.model.arith import quantize_activations, verify_gemm
from speq.model.checkpoint import CheckpointError
from speq.model.encoded_file import read_encoded
from speq.model.encoding import encode_linears, linear_weights, tensors_for
from speq.model.evaluation import encoded_costs
from speq.model.format import EncodedTensor
from speq.model.format import encode as encode_tensor
from speq.model.loaders import load_model, smollm2_path
from speq.model.number_format import FormatConfig
from speq.model.prompts import first_of_each, shipped_prompts
from speq.model.settings import SAMPLERS
from speq.model.speculation import Sampling, Settings, Statistics
from speq.sim.benches.gemm_engine import Gemm, run_gemms
from speq.sim.session import board_for

#: [O, K] of the seven linear layers of a SmolLM2-135M block, and the number of blocks.
SMOLLM2_BLOCK = (
    (576, 576),
    (192, 576),
    (192, 576),
    (576, 576),
    (1536, 576),
    (1536, 576),
    (576, 1536),
)
SMOLLM2_BLOCKS = 30


@dataclass(frozen=True)
class BenchSettings:
    """What benchmarks are told.

    Attributes
    ----------
    seed : int
        Seed of everything random.
    liberty : Path or None
        Standard-cell library to measure areas with.
    encoded : Path or None
        SmolLM2's file of `speq encode`, to compare samplers with.
    """

    seed: int
    liberty: Path | None = None
    encoded: Path | None = None


class Skipped(Exception):
    """A benchmark cannot run; the message says why, and what would help."""


@dataclass(frozen=True)
class Figure:
    """A measured value and its target.

    Attributes
    ----------
    name, unit : str
    value : float
        In `unit`.
    target : float or None
        In `unit`; None for a value without a target.
    at_most : bool
        Whether the target is an upper limit, else it is a lower one.
    note : str
        What it was measured on.
    column : str
        Of a table with a row for each name, where a thing has several values; "" otherwise.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = True
    note: str = ""
    column: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value keeps to its target, if there is one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median duration of `repeats` calls, in seconds, after one call that is not counted."""
    work()
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def normal_weights(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random weights with the spread of a trained layer's, torch.float16 [rows, columns]."""
    return (torch.randn(rows, columns, generator=generator) * 0.05).half()


def block_weights(seed: int) -> tuple[list[torch.Tensor], str]:
    """The weights of SmolLM2-135M's blocks, or random ones of their shapes, and which these are."""
    try:
        smollm2_path()
    except CheckpointError:
        generator = torch.Generator().manual_seed(seed)
        shapes = SMOLLM2_BLOCK * SMOLLM2_BLOCKS
        weights = [normal_weights(*shape, generator) for shape in shapes]
        return weights, f"random weights in SmolLM2-135M's shapes, seed {seed}"
    return list(
        linear_weights(load_model("smollm2"), r"^block\.").values()
    ), "SmolLM2-135M's blocks"


def codec(settings: BenchSettings) -> list[Figure]:
    """Encode and decode the weights of SmolLM2-135M's blocks."""
    weights, source = block_weights(settings.seed)
    config = FormatConfig()

    def encode_all() -> list[EncodedTensor]:
        return [encode_tensor(weight, config) for weight in weights]

    encoded = encode_all()
    note = f"{sum(weight.numel() for weight in weights) / 1e6:.0f} M weights: {source}"
    encode_seconds = median_seconds(encode_all, 3)
    decode_seconds = median_seconds(lambda: [tensor.decode() for tensor in encoded], 3)
    return [
        Figure("encode", encode_seconds, "s", 15, True, note),
        Figure("decode", decode_seconds, "s", 15, True, note),
    ]


def verify(settings: BenchSettings) -> list[Figure]:
    """Exact verify-mode products of the largest SmolLM2 layer, for one token and for eight."""
    generator = torch.Generator().manual_seed(settings.seed)
    outputs, inputs = 1536, 576
    weights = normal_weights(outputs, inputs, generator)
    figures = []
    for tokens, target in ((1, 200), (8, 1000)):
        x = torch.randn(tokens, inputs, generator=generator).half()
        seconds = median_seconds(lambda x=x: verify_gemm(x, weights), 21)
        rate = tokens * inputs * outputs / seconds / 1e6
        note = f"K = {inputs}, O = {outputs}, random, seed {settings.seed}"
        figures.append(Figure(f"verify_gemm, T = {tokens}", rate, "M MAC/s", target, False, note))
    return figures


def verilog(settings: BenchSettings) -> list[Figure]:
    """Generate the Verilog of an 8 x 64 engine (nothing in it is random)."""
    config = EngineConfig(rows=8, cols=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.v"
        seconds = median_seconds(lambda: write_verilog(config, path), 3)
        megabytes = path.stat().st_size / 1e6
    return [
        Figure("Verilog generation", seconds, "s", 20, True, "8 x 64 engine, without accelerator"),
        Figure("Verilog size", megabytes, "MB", 2, True, "8 x 64 engine, without accelerator"),
    ]


def simulation(settings: BenchSettings) -> list[Figure]:
    """Simulate GEMMs of both modes on the 8 x 16 engine."""
    config = EngineConfig(rows=8, cols=16)
    generator = torch.Generator().manual_seed(settings.seed)
    weights = encode_tensor(normal_weights(576, 576, generator), config.format, columns=config.cols)
    x = torch.randn(config.rows, 576, generator=generator).half()
    gemms = [Gemm(x, weights), Gemm(quantize_activations(x[:1]), weights)] * 4
    speeds = [run_gemms(config, gemms, seed=settings.seed).cycles_per_second for _ in range(3)]
    note = f"8 x 16 engine, {len(gemms)} GEMMs of K = O = 576, verify and draft"
    return [Figure("simulation", statistics.median(speeds), "cycles/s", 15_000, False, note)]


def accelerator(settings: BenchSettings) -> list[Figure]:
    """Decode with `tiny` on the simulated 8 x 16 accelerator and its memory, without stalls."""
    tokens = 64
    config = AcceleratorConfig(EngineConfig(rows=8, cols=16, max_k=256))
    model = load_model("tiny")
    encoded = encode_linears(model, config.engine.format)
    prompt = model.tokenizer.encode("Once upon a time")
    note = f"tiny, 8 x 16 accelerator, {tokens} tokens, memory latency 16 cycles"
    cycles, seconds, simulated = {}, {}, 0
    board = board_for(model, encoded, config)
    with Session(model, encoded, board) as session:
        for name, length in (("plain", 0), ("speculative", 7)):
            first, started = board.cycles(), time.perf_counter()
            options = Settings(rows=8, draft_length=length, threshold=1.0)
            for _ in session.generate(prompt, max_tokens=tokens, settings=options):
                pass
            seconds[name] = time.perf_counter() - started
            simulated += board.cycles() - first
            counters = session.driver.counters()
            cycles[name] = (counters["CYCLES"] - counters["HOST_CYCLES"]) / tokens
    speed = simulated / sum(seconds.values())
    rate = tokens / seconds["speculative"]
    ratio = cycles["speculative"] / cycles["plain"]
    return [
        Figure("accelerator, plain", cycles["plain"], "cycles/token", 25_000, True, note),
        Figure("accelerator, speculative", cycles["speculative"], "cycles/token", note=note),
        Figure("speculative / plain", ratio, "", 0.65, True, note),
        Figure("simulation of the accelerator", speed, "cycles/s", 20_000, False, note),
        Figure("decoding in simulation", rate, "tokens/s", 1, False, note),
    ]


def vector(settings: BenchSettings) -> list[Figure]:
    """Vector operations of whole passes, nothing left to a host, on two models.

    Of each operation with its target: elements of results per cycle among others like it, cycles
    of one alone from its start to its last result in memory, and what all of a pass add to it: the
    cycles by which a program is longer with them than without, where it ends there.
    """
    figures = []
    for shape in shapes(settings.seed):
        for kind, measured in measure(shape).items():
            rows = "a row" if kind is PassKind.DRAFT else f"{shape.rows} rows"
            note = f"{shape.note}, {kind.name.lower()} pass of {rows} behind {POSITION} entries"
            figures += [
                Figure("pass", measured.cycles, "cycles", note=note),
                Figure("its blocks", measured.blocks, "cycles", note=note),
                *(
                    Figure(name, measured.counters[name], "cycles", note=note)
                    for name in ("VECTOR_CYCLES", "VECTOR_STALLS", "COMPUTE_CYCLES")
                ),
            ]
            for (operation, target), cycles in measured.operations.items():
                name = f"{operation.name} to {target.name}"
                figures += [
                    Figure(name, value, unit, note=note, column=column)
                    for column, value, unit in (
                        ("elements", cycles.elements, ""),
                        ("elements\n/cycle", cycles.elements / cycles.repeated, ""),
                        ("alone", cycles.alone, "cycles"),
                        ("adds", cycles.adds, "cycles"),
                        ("of the\nblocks", 100 * cycles.adds / measured.blocks, "%"),
                    )
                ]
    return figures


def samplers(settings: BenchSettings) -> list[Figure]:
    """Sampled decoding of the golden model with either sampler at three temperatures."""
    if settings.encoded is None:
        raise Skipped("it needs SmolLM2's file of speq encode: --encoded FILE")
    per_kind, tokens = 4, 16
    model, file = load_model("smollm2"), read_encoded(settings.encoded)
    encoded = tensors_for(model, file, settings.encoded)
    chosen = file.settings["alternates"]
    costs = encoded_costs(model.config, encoded, chosen.reranked).relative
    kinds = first_of_each(shipped_prompts("evaluation"), per_kind)
    texts = [text for kind in kinds.values() for text in kind]
    prompts = [model.tokenizer.encode_chat(text) for text in texts]
    figures = []
    with Session(model, encoded) as session:
        for temperature in (0.3, 0.7, 1.0):
            note = f"SmolLM2, {len(prompts)} prompts, {tokens} tokens, T = {temperature}"
            for sampler in SAMPLERS:
                total = Statistics()
                for number, prompt in enumerate(prompts):
                    generator = torch.Generator().manual_seed(settings.seed + number)
                    for step in session.golden(
                        prompt,
                        max_tokens=tokens,
                        settings=chosen,
                        sampling=Sampling(temperature, sampler=sampler),
                        generator=generator,
                        stop_ids=model.tokenizer.stop_ids,
                    ):
                        total.add(step)
                figures += [
                    Figure(f"{sampler}, acceptance", 100 * total.match_rate, "%", note=note),
                    Figure(f"{sampler}, verify pass", total.tokens_per_pass, "tokens", note=note),
                    Figure(f"{sampler}, modelled speedup", total.speedup(*costs), "", note=note),
                ]
    return figures


def area(settings: BenchSettings) -> list[Figure]:
    """Synthesise the array's units and compare them with an FP16-only array's."""
    if settings.liberty is None:
        raise Skipped("it needs a standard-cell library: --liberty FILE, or LIBERTY=FILE")
    config = EngineConfig()
    areas = unit_areas(config, settings.liberty)
    note = f"synthesised with {settings.liberty.name}"
    figures = [Figure(f"area of {name}", value, "um2", note=note) for name, value in areas.items()]
    pe, column = 100 * pe_overhead(areas), 100 * column_overhead(areas, config)
    extra = (
        f"remap and {config.draft_rows} dual-mode PE in a column of {config.rows} PEs, against "
        "FP16-only ones"
    )
    return [
        *figures,
        Figure("dual-mode PE, extra area", pe, "%", 30, True, "against the FP16-only PE"),
        Figure("array, extra area", column, "%", 5, True, extra),
    ]
