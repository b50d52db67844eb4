# SPDX-License-Identifier: Apache-2.0
"""The accelerator's RTL decodes the golden model's tokens and bits, in the predicted cycles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speq.host.driver import Host, Pass
from speq.host.layout import MemoryLayout
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.engine_config import EngineConfig
from speq.hw.verilog import generate_top
from speq.model import speculation
from speq.model.checkpoint import Model
from speq.model.cycles import Engine, Job, draft_pass, linear_shapes, stage_cycles, verify_pass
from speq.model.format import EncodedTensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig, draft_words
from speq.model.speculation import Settings, Statistics, Step, generate
from speq.model.transformer import prepare_draft_linears
from speq.sim.simulated_board import CHANNELS, MemoryOptions, SimulatedBoard
from tests.host.decoding import COUNTED, SEED, check, encoded_linears, system
from tests.model.drafted import drafted_model
from tests.model.small_models import random_tokens

# Simulations of these are built for test_accelerator.py as well.
FULL = system(EngineConfig())
FEW = system(EngineConfig(rows=4, cols=8, draft_rows=2, max_k=1024, max_o=4096))
NARROW = system(EngineConfig(rows=2, cols=8, max_k=256, max_o=512), weights=64, data=64)
CAPACITY = 128
LATENCY = 16

#: Largest relative error of predicted cycles.
TOLERANCE = 0.02
#: Cycles of a token of `tiny` on 8 x 16 PEs without the host's, and the ratio of speculative to
#: plain decoding: at most.
PLAIN_CYCLES = 25_000
SPECULATIVE_RATIO = 0.65

Encoded = dict[str, EncodedTensor]


@dataclass(frozen=True)
class MeasuredPass:
    """A pass of a decoding run.

    Attributes
    ----------
    kind : PassKind
    rows, start : int
        Its tokens, and the KV entries before them.
    cycles : int
        From its first HOST descriptor to the next pass's, without the host's.
    stages : list of int
        The same, from each of its HOST descriptors to the next, without the last stage.
    """

    kind: PassKind
    rows: int
    start: int
    cycles: int
    stages: list[int]


class Meter:
    """Looks at the counters of a decoding run at every HOST descriptor.

    Parameters
    ----------
    host : Host
        Before its next run.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._times: list[int] = []
        self._firsts: list[int] = []
        self._passes: list[Pass] = []
        host.observer = self._observe

    def _observe(self, current: Pass, index: int) -> None:
        if current.kind is PassKind.SINGLE:
            return
        if index == 0:
            self._firsts.append(len(self._times))
            self._passes.append(current)
        self._times.append(self.cycles())

    def cycles(self) -> int:
        """Of the run so far, without the host's."""
        # Both go on while the accelerator waits, so that the difference stands still.
        return self._host.registers["CYCLES"] - self._host.registers["HOST_CYCLES"]

    def passes(self) -> list[MeasuredPass]:
        """All passes, when the run is over."""
        times = [*self._times, self.cycles()]
        ends = [*self._firsts[1:], len(times) - 1]
        return [
            MeasuredPass(
                current.kind,
                len(current.tokens),
                current.start,
                times[end] - times[first],
                np.diff(times[first:end]).tolist(),
            )
            for current, first, end in zip(self._passes, self._firsts, ends, strict=True)
        ]


@cache
def verilog(config: AcceleratorConfig) -> str:
    return generate_top(config)


@contextmanager
def rtl_host(
    config: AcceleratorConfig,
    model: Model,
    encoded: Encoded | None,
    capacity: int = CAPACITY,
    **memory: object,
) -> Iterator[Host]:
    """A driver of the accelerator in the simulator."""
    size = MemoryLayout(config, model.config, encoded or {}, capacity).size
    options = MemoryOptions(size, **{"latency": LATENCY} | memory)
    with SimulatedBoard(verilog(config), config, options) as board:
        yield Host(board, model, encoded, capacity=capacity)


def check_counters(host: Host, steps: list[Step]) -> Statistics:
    """The accelerator counts what the steps say, which are the golden model's."""
    statistics = Statistics()
    for step in steps:
        statistics.add(step)
    counters = host.counters()
    counted = {name: counters[counter] for name, counter in COUNTED.items()}
    assert counted == {name: getattr(statistics, name) for name in COUNTED}
    return statistics


# `tiny` on 8 x 16 PEs.


@pytest.fixture(scope="module")
def tiny() -> Iterator[SimpleNamespace]:
    """The model with a driver, which decodes one text after the other."""
    model = load_model("tiny")
    encoded = encoded_linears(model)
    with rtl_host(FULL, model, encoded) as host:
        yield SimpleNamespace(model=model, encoded=encoded, host=host)


def decode(tiny: SimpleNamespace, text: str, settings: Settings, tokens: int) -> Statistics:
    """Decode text with `tiny` and compare steps and counters with the golden model's."""
    prompt = tiny.model.tokenizer.encode(text)
    steps = check(tiny.host, tiny.model, tiny.encoded, prompt, settings, max_tokens=tokens)
    return check_counters(tiny.host, steps)


def test_64_tokens_plain_and_speculative(tiny):
    """All bits, all counts, and both targets of speed."""
    cycles = {}
    for settings in (Settings(8, 0), Settings(8, threshold=1.0)):
        meter = Meter(tiny.host)
        statistics = decode(tiny, "Once upon a time", settings, 64)
        assert statistics.committed == 64
        cycles[settings.length] = meter.cycles() / 64
        check_prediction(meter, tiny.model, tiny.encoded, engine_of(FULL, LATENCY))
    assert statistics.accepted and statistics.alternate_hits
    ratio = cycles[7] / cycles[0]
    print(f"\ncycles per token: plain {cycles[0]:,.0f}, speculative {cycles[7]:,.0f} = {ratio:.3f}")
    assert cycles[0] <= PLAIN_CYCLES
    assert ratio <= SPECULATIVE_RATIO


def test_logits_of_all_rows(tiny, monkeypatch):
    """Not only of those that are committed: refused chain tokens and alternates as well."""
    expected = []
    verify = speculation.verify

    def recorded(*arguments):
        expected.append(verify(*arguments))
        return expected[-1]

    monkeypatch.setattr(speculation, "verify", recorded)
    settings = Settings(8, 5, 0.25)
    prompt = tiny.model.tokenizer.encode("Once upon a time")
    layers = prepare_draft_linears(tiny.encoded)
    list(generate(tiny.model, prompt, layers, max_tokens=16, settings=settings))
    got = []
    for _ in tiny.host.generate(prompt, max_tokens=16, settings=settings):
        got.append(tiny.host.verify_logits)
    assert len(got) == len(expected)
    for mine, golden in zip(got, expected, strict=True):
        assert mine.shape == golden.shape
        assert torch.equal(mine.view(torch.int32), golden.view(torch.int32))
    assert sum(len(rows) for rows in got) > 16


@pytest.mark.parametrize(
    ("draft_length", "threshold", "choices", "text"),
    [
        (0, 0.0, 4, "Lily had a red ball. She"),
        (1, 0.0, 1, "The"),
        (2, 1e9, 2, "One day, a boy named Tim found a big box in the park"),
        (3, 0.0, 3, "The cat and the dog were"),
        (4, 1.0, 1, "Mom said"),
        (5, math.inf, 4, "Ben"),
        (6, 0.25, 4, "There was a little girl who loved to play with her toys"),
        (7, 0.0, 2, "Once there was a"),
        (7, 0.0, 1, "They"),
    ],
)
def test_draft_lengths_thresholds_and_choices(tiny, draft_length, threshold, choices, text):
    """Behind prompts of one token and of several prefill passes."""
    settings = Settings(8, draft_length, threshold, choices)
    meter = Meter(tiny.host)
    statistics = decode(tiny, text, settings, 10)
    assert statistics.committed == 10
    check_prediction(meter, tiny.model, tiny.encoded, engine_of(FULL, LATENCY))


def test_stalls_and_reordered_responses():
    """On all channels of the memory."""
    model = load_model("tiny")
    encoded = encoded_linears(model)
    text = "Once upon a time, there was a big"
    memory = {"stalls": dict.fromkeys(CHANNELS, 80), "reorder": True, "seed": SEED, "latency": 5}
    with rtl_host(FULL, model, encoded, **memory) as host:
        stalled = SimpleNamespace(model=model, encoded=encoded, host=host)
        for settings, tokens in ((Settings(8, threshold=0.5), 16), (Settings(8, 0), 3)):
            decode(stalled, text, settings, tokens)


# Models of other shapes on small arrays.

SHAPES = {
    "odd sizes": ("llama", {"hidden": 44, "ffn_hidden": 172, "head_dim": 6, "vocab_size": 61}),
    "three KV heads": (
        "llama",
        {"hidden": 21, "ffn_hidden": 50, "heads": 3, "kv_heads": 3, "head_dim": 2},
    ),
    "shared by six": ("llama", {"heads": 6, "head_dim": 18, "tied_head": True}),
    "qwen2": ("qwen2", {"vocab_size": 67, "tied_head": True}),
    "qwen3": ("qwen3", {"heads": 4, "kv_heads": 2, "head_dim": 10}),
    "gemma3": ("gemma3", {"hidden": 36, "tied_head": True}),
}


@pytest.mark.parametrize(
    ("config", "shape"),
    [(FEW, shape) for shape in SHAPES] + [(NARROW, shape) for shape in ("odd sizes", "qwen3")],
    ids=lambda value: value if isinstance(value, str) else f"{value.weights.data_bits} bits",
)
def test_other_models(config, shape):
    """Speculative, plain from the encoded weights, and plain from FP16 weights in memory."""
    architecture, changes = SHAPES[shape]
    model = drafted_model(architecture, SEED, **changes)
    prompt = random_tokens(model.config, 7, SEED)
    rows = config.engine.rows
    for encoded, lengths in ((encoded_linears(model), (rows - 1, 0)), (None, (rows - 1,))):
        with rtl_host(config, model, encoded, capacity=24) as host:
            for length in lengths:
                options = {"max_tokens": 8 if length and encoded else 3}
                steps = check(host, model, encoded, prompt, Settings(rows, length), **options)
                statistics = check_counters(host, steps)
                assert bool(statistics.draft_passes) == bool(length and encoded)


# Cycles.


def engine_of(config: AcceleratorConfig, latency: int) -> Engine:
    engine = config.engine
    beats = max(1, 32 * engine.cols // config.data.data_bits)
    return Engine(engine.rows, engine.cols, latency=latency, result_beats=beats)


def predicted(measured: MeasuredPass, model: Model, encoded: Encoded, engine: Engine) -> int:
    """Cycles of a pass as the analytic model says."""
    formats = {name: tensor.config for name, tensor in encoded.items()}
    if measured.kind is PassKind.DRAFT:
        return draft_pass(model.config, engine, formats, measured.start).cycles
    return verify_pass(model.config, engine, formats, measured.rows, measured.start).cycles


def check_prediction(meter: Meter, model: Model, encoded: Encoded, engine: Engine) -> None:
    """Compare every pass of the last run and their sum with the analytic model."""
    passes = meter.passes()
    expected = [predicted(measured, model, encoded, engine) for measured in passes]
    print(f"\nlatency {engine.latency}: pass, rows, passes, predicted, measured, worst error")
    for kind, rows in sorted({(p.kind.value, p.rows) for p in passes}):
        pairs = [
            (e, p.cycles)
            for e, p in zip(expected, passes, strict=True)
            if (p.kind.value, p.rows) == (kind, rows)
        ]
        worst = max(abs(e / measured - 1) for e, measured in pairs)
        totals = "".join(f"{sum(column):11,}" for column in zip(*pairs, strict=True))
        print(f"{PassKind(kind).name:6} {rows:2} {len(pairs):3}{totals} {worst:.2%}")
        assert worst <= TOLERANCE
    assert sum(expected) == pytest.approx(meter.cycles(), rel=TOLERANCE)


@pytest.mark.parametrize("latency", [1, 48])
def test_cycles_at_other_latencies(latency):
    """Plain from FP16 weights, plain from encoded ones, and speculative."""
    model = load_model("tiny")
    encoded = encoded_linears(model)
    prompt = model.tokenizer.encode("Once upon a time")
    runs = [({}, Settings(8, 0), 3), (encoded, Settings(8, 0), 3)]
    runs += [(encoded, Settings(8, 7, 1.0, choices), 12) for choices in (1, 4)]
    for formats, settings, tokens in runs:
        with rtl_host(FULL, model, formats, latency=latency) as host:
            meter = Meter(host)
            check(host, model, formats, prompt, settings, max_tokens=tokens)
            check_prediction(meter, model, formats, engine_of(FULL, latency))


def test_cycles_of_single_layers_of_smollm2():
    """A block of SmolLM2-135M's dimensions with random weights: stages with its linear layers."""
    dimensions = {"hidden": 576, "ffn_hidden": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}
    model = drafted_model("llama", SEED, blocks=1, vocab_size=512, **dimensions)
    encoded = encoded_linears(model)
    engine = engine_of(FULL, LATENCY)
    shapes = linear_shapes(model.config)
    stages = {0: ("q_proj", "k_proj", "v_proj"), 3: ("o_proj",)}
    stages |= {4: ("gate_proj", "up_proj"), 5: ("down_proj",)}
    with rtl_host(FULL, model, encoded, capacity=32) as host:
        meter = Meter(host)
        check(host, model, encoded, [1, 2, 3], Settings(8, 2), max_tokens=4)
        check_prediction(meter, model, encoded, engine)
        passes = meter.passes()
    assert {p.kind for p in passes} == {PassKind.DRAFT, PassKind.VERIFY}
    print("\npass, rows, layers, predicted, measured")
    for measured in passes:
        drafting = measured.kind is PassKind.DRAFT
        for index, names in stages.items():
            jobs = []
            for name in names:
                o, k = shapes[f"block.0.{name}"]
                words = draft_words(k, FormatConfig()) if drafting else k
                jobs.append(Job(words, o, measured.rows, planes=1 if drafting else 2))
            expected, got = stage_cycles(jobs, engine), measured.stages[index]
            print(f"{measured.kind.name:6} {measured.rows} {'+'.join(names):20} {expected} {got}")
            assert expected == pytest.approx(got, rel=TOLERANCE)
