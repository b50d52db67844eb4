# SPDX-License-Identifier: Apache-2.0
"""The GEMM engine against the golden arithmetic: shapes, modes, stalls, cycles, specials."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from speq.hw import EngineConfig, Mode
from speq.model.arith import draft_gemm, quantize_activations, to_float16, verify_gemm
from speq.model.cycles import Engine, gemm_cycles, gemm_latency
from speq.model.format import encode
from speq.model.number_format import FormatConfig
from speq.sim.benches.gemm_engine import Gemm, RunResult, command_word, run_gemms
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed

SMALL = EngineConfig(rows=4, cols=6, draft_rows=2, max_k=300)
REFERENCE = EngineConfig()


def operands(rng: np.random.Generator, rows: int, k: int) -> torch.Tensor:
    """FP16 [rows, k]: mostly ordinary numbers, some zeros, subnormals and extremes."""
    values = torch.from_numpy(rng.normal(0, 0.3, (rows, k)).astype(np.float16))
    special = torch.tensor([0.0, -0.0, 6e-8, -3e-5, 65504.0, -65504.0], dtype=torch.float16)
    chosen = torch.from_numpy(rng.integers(0, len(special), (rows, k)))
    return torch.where(torch.from_numpy(rng.random((rows, k)) < 0.05), special[chosen], values)


def gemm(
    rng: np.random.Generator,
    config: EngineConfig,
    mode: Mode,
    size: tuple[int, int, int],
    half: bool = False,
) -> tuple[Gemm, np.ndarray]:
    """A random GEMM of size (T, K, O), and its golden output bits, uint32 [T, O]."""
    tokens, k, o = size
    x, w = operands(rng, tokens, k), operands(rng, o, k)
    return with_golden(config, mode, x, w, half)


def with_golden(
    config: EngineConfig, mode: Mode, x: torch.Tensor, w: torch.Tensor, half: bool = False
) -> tuple[Gemm, np.ndarray]:
    name = f"{mode.name.lower()} T={len(x)} K={x.shape[1]} O={len(w)}"
    if mode is Mode.BYPASS:
        job, golden = Gemm(x, w, half, name), verify_gemm(x, w)
    else:
        encoded = encode(w, config.format, name=name, columns=config.cols)
        if mode is Mode.VERIFY:
            job, golden = Gemm(x, encoded, half, name), verify_gemm(x, w)
        else:
            blocks = quantize_activations(x, config.format.group)
            job, golden = Gemm(blocks, encoded, half, name), draft_gemm(blocks, encoded)
    if half:
        return job, to_float16(golden).numpy().view(np.uint16).astype(np.uint32)
    return job, golden.numpy().view(np.uint32)


def check(config: EngineConfig, pairs: list, **options: object) -> RunResult:
    """Run GEMMs one after the other and compare every output bit."""
    outcome = run_gemms(config, [job for job, _ in pairs], **options)
    for (job, golden), result in zip(pairs, outcome.results, strict=True):
        tokens, _, o = job.size
        assert_equal_bits(
            f"GemmEngine {job.name} half={job.half}",
            expected=golden,
            got=result.output,
            operands={"token": np.arange(tokens)[:, None], "output": np.arange(o)[None]},
            cycles=np.full(golden.shape, result.end),
        )
    return outcome


def random_gemms(rng: np.random.Generator, config: EngineConfig, count: int) -> list:
    pairs = []
    for _ in range(count):
        mode = Mode(int(rng.integers(3)))
        rows = config.draft_rows if mode is Mode.DRAFT else config.rows
        tokens = int(rng.integers(1, rows + 1))
        k = int(rng.choice([rng.integers(1, 12), rng.integers(1, config.max_k + 1)]))
        o = int(rng.integers(1, 4 * config.cols))
        pairs.append(gemm(rng, config, mode, (tokens, k, o), bool(rng.integers(2))))
    return pairs


@pytest.mark.parametrize("case", range(6))
def test_random_shapes_modes_and_stalls(case: int) -> None:
    rng = np.random.default_rng((seed(), case))
    pairs = random_gemms(rng, SMALL, 40)
    streams = ["command", "activations", "weights", "groups", "results"]
    # No stalls, then each stream alone, then all at once.
    if case == 0:
        stalls = {}
    elif case <= 4:
        stalls = {streams[case]: int(rng.integers(64, 240))}
    else:
        stalls = {stream: int(rng.integers(0, 200)) for stream in streams}
    print(f"seed {seed()}, case {case}, stalls {stalls}")
    check(SMALL, pairs, stalls=stalls, seed=case)


@pytest.mark.parametrize("split", [0, 1, 3])
def test_other_formats(split: int) -> None:
    group = {0: 32, 1: 64, 3: 128}[split]
    config = EngineConfig(
        rows=3, cols=2, draft_rows=3, max_k=256, format=FormatConfig(group=group, split=split)
    )
    rng = np.random.default_rng((seed(), split))
    check(config, random_gemms(rng, config, 20), stalls={"weights": 60}, seed=split)


def test_fp16_only_baseline() -> None:
    config = EngineConfig(rows=4, cols=3, draft_rows=0, max_k=64)
    rng = np.random.default_rng(seed())
    sizes = [(4, 64, 7), (1, 1, 1), (3, 17, 3), (2, 2, 9)]
    check(config, [gemm(rng, config, Mode.BYPASS, size) for size in sizes])


def test_cycles_without_stalls() -> None:
    """Exact cycle counts, back to back, and mode switches that cost nothing."""
    rng = np.random.default_rng(seed())
    config = REFERENCE
    sizes = [
        (Mode.VERIFY, (8, 100, 100)),
        (Mode.DRAFT, (1, 578, 33)),
        (Mode.DRAFT, (1, 576, 64)),
        (Mode.VERIFY, (8, 8, 160)),  # as many steps as tokens: the results are at full speed
        (Mode.BYPASS, (3, 150, 17)),
        (Mode.VERIFY, (8, 5, 50)),  # fewer steps than tokens: 8 cycles a tile
    ]
    pairs = [gemm(rng, config, mode, size) for mode, size in sizes]
    outcome = check(config, pairs)
    overhead = outcome.latencies["engine_overhead"]
    first = outcome.results[0]
    assert first.start - first.command == outcome.latencies["engine_fill"]
    model = Engine(config.rows, config.cols)
    steps, (tokens, _, o) = pairs[0][0].steps, pairs[0][0].size
    assert first.end - first.command == gemm_latency(steps, o, tokens, model)
    previous_last_word = None
    for (job, _), result in zip(pairs, outcome.results, strict=True):
        tokens, _, o = job.size
        tiles = -(-o // config.cols)
        # A short tile waits for the results of the one before, at its last step.
        words = job.steps * tiles + max(0, tokens - job.steps) * (tiles - 1)
        last_word = result.end - overhead - (tokens - 1)
        assert last_word - result.start + 1 == words, job.name
        # The analytic model counts the wait for the last tile's results too.
        assert gemm_cycles(job.steps, o, tokens, model) == words + max(0, tokens - job.steps)
        if previous_last_word is not None and job.size[1] < 400:
            assert result.start == previous_last_word + 1, f"a gap before {job.name}"
        previous_last_word = last_word


def test_not_finite() -> None:
    """One infinite or NaN operand spoils its row or column and nothing else."""
    rng = np.random.default_rng(seed())
    pairs = []
    for mode in (Mode.VERIFY, Mode.DRAFT, Mode.BYPASS):
        for _ in range(4):
            tokens = 1 + 3 * (mode is not Mode.DRAFT)
            x = torch.from_numpy(rng.normal(0, 1, (tokens, 100)).astype(np.float16))
            w = torch.from_numpy(rng.normal(0, 1, (13, 100)).astype(np.float16))
            x[rng.integers(tokens), rng.integers(100)] *= float("inf") if rng.random() < 0.5 else 1
            w[rng.integers(13), rng.integers(100)] = float(rng.choice([np.inf, -np.inf, np.nan]))
            with pytest.warns(RuntimeWarning) if mode is not Mode.BYPASS else nullcontext():
                pairs.append(with_golden(SMALL, mode, x, w, half=bool(rng.integers(2))))
    assert check(SMALL, pairs, stalls={"weights": 50}).nonfinite
    finite = [gemm(rng, SMALL, Mode.VERIFY, (2, 9, 9))]
    assert not check(SMALL, finite).nonfinite
    # Sums of large numbers: finite in FP32, infinite in FP16. Columns beyond o do not count.
    large = torch.full((3, 40), 60_000.0).half()
    for half in (False, True):
        overflowing = [with_golden(SMALL, Mode.BYPASS, large, large, half=half)]
        assert check(SMALL, overflowing).nonfinite == half


def test_impossible_commands_are_dropped() -> None:
    """Each is dropped, says so, and takes nothing from the streams of the next command."""
    rng = np.random.default_rng(seed())
    good = [gemm(rng, SMALL, Mode.VERIFY, (4, 9, 9)), gemm(rng, SMALL, Mode.DRAFT, (2, 9, 9))]
    commands = {
        "k = 0": (Mode.VERIFY, 0, 9, 2),
        "k too large": (Mode.VERIFY, SMALL.max_k + 1, 9, 2),
        "o = 0": (Mode.BYPASS, 9, 0, 2),
        "no tokens": (Mode.VERIFY, 9, 9, 0),
        "more tokens than rows": (Mode.VERIFY, 9, 9, SMALL.rows + 1),
        "more tokens than rows that can draft": (Mode.DRAFT, 9, 9, SMALL.draft_rows + 1),
        "no such mode": (3, 9, 9, 2),
    }
    for reason, fields in commands.items():
        print(reason)
        check(SMALL, good, impossible=[command_word(SMALL, *fields)])
