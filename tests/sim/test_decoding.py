# SPDX-License-Identifier: Apache-2.0
"""The accelerator's RTL decodes the golden model's tokens and bits, in the predicted cycles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch

from speq.host.image import model_image
from speq.host.image_file import read_image, write_image
from speq.host.layout import Region
from speq.host.meter import Meter, cycle_engine
from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.engine_config import EngineConfig
from speq.model import speculation
from speq.model.checkpoint import Model, linear_shapes
from speq.model.cycles import Engine, Job, stage_cycles
from speq.model.encoded_file import EncodedModel, read_encoded, sha256, write_encoded
from speq.model.encoder import calibrate, encode_fitted
from speq.model.encoding import encode_linears
from speq.model.format import EncodedTensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig, draft_words
from speq.model.schedule import Linears, pass_schedule, stages
from speq.model.speculation import Settings, Statistics, Step, generate
from speq.sim.session import board_for, simulated_session
from speq.sim.simulated_board import CHANNELS
from tests.host.decoding import (
    COUNTED,
    GUESSING,
    REPETITIVE,
    SEED,
    check,
    check_end,
    system,
)
from tests.model.drafted import drafted_model
from tests.model.small_models import overflowing, random_tokens

# Simulations of these are built for test_accelerator.py as well.
FULL = system(EngineConfig())
FEW = system(EngineConfig(rows=4, cols=8, max_k=1024))
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


def rtl_session(
    config: AcceleratorConfig,
    model: Model,
    encoded: Encoded | None,
    capacity: int = CAPACITY,
    **memory: object,
) -> Session:
    """A session on the accelerator in the simulator."""
    memory = {"latency": LATENCY} | memory
    return simulated_session(model, encoded, config, capacity=capacity, **memory)


def check_counters(session: Session, steps: list[Step]) -> Statistics:
    """The accelerator counts what the steps say, which are the golden model's."""
    statistics = Statistics()
    for step in steps:
        statistics.add(step)
    counters = session.driver.counters()
    counted = {name: counters[counter] for name, counter in COUNTED.items()}
    assert counted == {name: getattr(statistics, name) for name in COUNTED}
    return statistics


def test_an_image_file_behind_a_high_address(tmp_path):
    """All bits, from a file, with addresses of 40 bits and bursts that are cut at both ends."""
    model = drafted_model("llama", SEED)
    path = tmp_path / "model.image"
    settings = Settings(4, threshold=0.25, reranked=4)
    write_image(path, model_image(FEW, model, encode_linears(model), settings=settings))
    image, base = read_image(path), (1 << 39) + 3 * FEW.alignment
    memory = Region(base, base + image.size)
    board = board_for(
        model, image.encoded(model), FEW, capacity=image.capacity, base=base, latency=LATENCY
    )
    with Session(model, board=board, memory=memory, image=image) as session:
        steps = check(session, random_tokens(model.config, 6, SEED), image.settings)
        assert check_counters(session, steps).draft_passes


# `tiny` on 8 x 16 PEs.


@pytest.fixture(scope="module")
def tiny() -> Iterator[Session]:
    """The model, which decodes one text after the other."""
    model = load_model("tiny")
    with rtl_session(FULL, model, encode_linears(model)) as session:
        yield session


def decode(session: Session, text: str, settings: Settings, tokens: int) -> Statistics:
    """Decode text and compare steps and counters with the golden model's."""
    prompt = session.model.tokenizer.encode(text)
    steps = check(session, prompt, settings, max_tokens=tokens)
    return check_counters(session, steps)


def test_64_tokens_plain_and_speculative(tiny):
    """All bits, all counts, and both targets of speed."""
    cycles = {}
    for settings in (Settings(8, 0), Settings(8, threshold=1.0)):
        meter = Meter(tiny.driver)
        statistics = decode(tiny, "Once upon a time", settings, 64)
        assert statistics.committed == 64
        cycles[settings.length] = meter.cycles() / 64
        check_prediction(meter, tiny.model, tiny.encoded, cycle_engine(FULL, LATENCY))
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
    list(tiny.golden(prompt, max_tokens=16, settings=settings))
    got = []
    for _ in tiny.generate(prompt, max_tokens=16, settings=settings):
        got.append(tiny.driver.verify_logits)
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
    meter = Meter(tiny.driver)
    statistics = decode(tiny, text, settings, 10)
    assert statistics.committed == 10
    check_prediction(meter, tiny.model, tiny.encoded, cycle_engine(FULL, LATENCY))


@pytest.mark.parametrize(
    ("reranked", "draft_length", "choices", "threshold"),
    [(8, 7, 4, 0.5), (3, 4, 8, 0.0), (1, 2, 3, math.inf)],
)
def test_exact_logits_of_the_best_drafted_tokens(tiny, reranked, draft_length, choices, threshold):
    """Chains, margins and alternates are those of exact logits, in the cycles of their tiles."""
    settings = Settings(8, draft_length, threshold, choices, reranked)
    meter = Meter(tiny.driver)
    decode(tiny, "Tom and his dog went to", settings, 12)
    check_prediction(meter, tiny.model, tiny.encoded, cycle_engine(FULL, LATENCY))
    tiles = [p.shape.tiles for p in meter.passes if p.shape.kind is PassKind.DRAFT]
    assert 1 <= min(tiles) <= max(tiles) <= reranked


def test_guesses_from_repeated_texts(tiny):
    """Rows of all kinds are verified and accepted, some behind each other, and a step has no draft
    pass: the golden model's tokens, margins, logit bits and counts."""
    settings = Settings(8, policy=GUESSING)
    statistics = decode(tiny, REPETITIVE, settings, 24)
    assert all(getattr(statistics, name) for name in COUNTED)


@pytest.fixture(scope="module")
def optimised(tmp_path_factory) -> Encoded:
    """`tiny` from a file as the optimiser writes it: fitted scale codes, and a head that drafts a
    part of the vocabulary."""
    model = load_model("tiny")
    prompt = model.tokenizer.encode("Tom and his dog went to")
    calibration = calibrate(model, [prompt], 24)
    tensors = {
        name: encode_fitted(
            model.linear_weight(name), calibration.moment(name), FormatConfig(), name, columns=32
        )
        for name in linear_shapes(model.config)
    }
    tensors["head"] = replace(tensors["head"], drafted_outputs=322)
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    path = tmp_path_factory.mktemp("encoded") / "tiny"
    write_encoded(path, EncodedModel("tiny", tensors, digests))
    return dict(read_encoded(path).tensors)


def test_files_of_the_optimiser(optimised):
    """By draft logits alone, and with exact ones of more tokens than the head's last tile has."""
    model = load_model("tiny")
    with rtl_session(FULL, model, optimised) as session:
        for reranked, choices in ((0, 4), (8, 8)):
            meter = Meter(session.driver)
            settings = Settings(8, 5, 0.5, choices, reranked)
            assert decode(session, "Tom and his dog went to", settings, 12).accepted
            check_prediction(meter, model, optimised, cycle_engine(FULL, LATENCY))


def test_everything_with_stalls_and_reordered_responses(optimised):
    """On all channels of the memory: 66 tokens, drafts of all lengths, exact logits of 1 to 8
    tokens, rows of all kinds and steps without a draft pass."""
    model, total = load_model("tiny"), Statistics()
    memory = {"stalls": dict.fromkeys(CHANNELS, 80), "reorder": True, "seed": SEED, "latency": 5}
    with rtl_session(FULL, model, optimised, **memory) as stalled:
        for length in range(8):
            settings = Settings(8, length, 0.0, 4, 8 - length, policy=GUESSING)
            count = 3 if length == 0 else 9
            text = REPETITIVE if length % 2 else "Tom and his dog went to"
            statistics = decode(stalled, text, settings, count)
            for field in fields(Statistics):
                value = getattr(total, field.name) + getattr(statistics, field.name)
                setattr(total, field.name, value)
    assert total.committed == 66 and all(getattr(total, name) for name in COUNTED), total


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


@pytest.mark.parametrize("layer", ["block.0.values", "block.1.down_proj", "head"])
def test_decoding_ends_where_results_are_not_finite(layer):
    """As the golden model does, with the same error: in the prompt, behind some steps, and where
    drafts alone leave FP16's range. Then the next text decodes as it should."""
    base, settings = drafted_model("llama", SEED), Settings(4, threshold=0.25)
    prompt = [1, 2, 3, 4, 5, 6]
    ordinary = overflowing(base, 7, layer, scale=2.0**-6)
    text = [t for s in generate(ordinary, prompt, None, max_tokens=5) for t in s.tokens]
    number = max(i for i, t in enumerate(text) if t not in prompt + text[:i])
    model = overflowing(base, text[number], layer)
    encoded = encode_linears(model)
    ends = []
    with rtl_session(FEW, model, encoded, capacity=24) as session:
        for start in (prompt, [*prompt[:5], text[number], 6], [10, 11], [12]):
            steps, error = check_end(session, start, settings, max_tokens=6)
            ends.append(error and (error.kind, error.layer, error.position))
            assert error or sum(len(step.tokens) for step in steps) == 6
    assert ends[0] == ("verify", layer, len(prompt) + number) and None in ends
    if layer == "block.0.values":
        assert ends[1] == ("prompt", layer, 5)


@pytest.mark.parametrize(
    ("config", "shape"),
    [(FEW, shape) for shape in SHAPES] + [(NARROW, shape) for shape in ("odd sizes", "qwen3")],
    ids=lambda value: value if isinstance(value, str) else f"{value.weights.data_bits} bits",
)
def test_other_models(config, shape):
    """Speculative, with drafts of 4 bits and then of exact logits, plain from the encoded weights,
    and plain from FP16 weights in memory."""
    architecture, changes = SHAPES[shape]
    model = drafted_model(architecture, SEED, **changes)
    prompt = random_tokens(model.config, 7, SEED)
    rows = config.engine.rows
    drafted = [(rows - 1, 0), (0, 0), (rows - 1, 5)]
    for encoded, runs in ((encode_linears(model), drafted), (None, [(rows - 1, 0)])):
        with rtl_session(config, model, encoded, capacity=24) as session:
            for length, reranked in runs:
                options = {"max_tokens": 8 if length and encoded else 3}
                settings = Settings(rows, length, reranked=reranked)
                steps = check(session, prompt, settings, **options)
                statistics = check_counters(session, steps)
                assert bool(statistics.draft_passes) == bool(length and encoded)


# Cycles.


def check_prediction(meter: Meter, model: Model, encoded: Encoded, engine: Engine) -> None:
    """Compare every pass of the last run and their sum with the analytic model."""
    meter.stop()
    # Prefill passes come before the counters are cleared.
    passes = [p for p in meter.passes if p.shape.kind is not PassKind.SINGLE]
    formats = {name: tensor.config for name, tensor in encoded.items()}
    drafted = encoded["head"].drafted_outputs if encoded else None
    expected = [p.shape.predicted_cycles(model.config, engine, formats, drafted) for p in passes]
    print(f"\nlatency {engine.latency}: pass, rows, passes, predicted, measured, worst error")
    for kind, rows in sorted({(p.shape.kind.value, p.shape.rows) for p in passes}):
        pairs = [
            (e, p.cycles)
            for e, p in zip(expected, passes, strict=True)
            if (p.shape.kind.value, p.shape.rows) == (kind, rows)
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
    encoded = encode_linears(model)
    prompt = model.tokenizer.encode("Once upon a time")
    runs = [({}, Settings(8, 0), 3), (encoded, Settings(8, 0), 3)]
    runs += [(encoded, Settings(8, 7, 1.0, choices), 12) for choices in (1, 4)]
    for formats, settings, tokens in runs:
        with rtl_session(FULL, model, formats, latency=latency) as session:
            meter = Meter(session.driver)
            check(session, prompt, settings, max_tokens=tokens)
            check_prediction(meter, model, formats, cycle_engine(FULL, latency))


def test_cycles_of_single_layers_of_smollm2():
    """A block of SmolLM2-135M's dimensions with random weights: stages with its linear layers."""
    dimensions = {"hidden": 576, "ffn_hidden": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}
    model = drafted_model("llama", SEED, blocks=1, vocab_size=512, **dimensions)
    encoded = encode_linears(model)
    engine = cycle_engine(FULL, LATENCY)
    shapes = linear_shapes(model.config)
    layers = {
        index: stage.names
        for index, stage in enumerate(stages(pass_schedule(model.config)))
        if isinstance(stage, Linears) and stage.names != ("head",)
    }
    assert list(layers) == [0, 3, 4, 5]
    with rtl_session(FULL, model, encoded, capacity=32) as session:
        meter = Meter(session.driver)
        check(session, [1, 2, 3], Settings(8, 2), max_tokens=4)
        check_prediction(meter, model, encoded, engine)
    passes = [p for p in meter.passes if p.shape.kind is not PassKind.SINGLE]
    assert {p.shape.kind for p in passes} == {PassKind.DRAFT, PassKind.VERIFY}
    print("\npass, rows, layers, predicted, measured")
    for measured in passes:
        kind, rows = measured.shape.kind, measured.shape.rows
        drafting = kind is PassKind.DRAFT
        for index, names in layers.items():
            jobs = []
            for name in names:
                o, k = shapes[name]
                words = draft_words(k) if drafting else k
                jobs.append(Job(words, o, rows, planes=1 if drafting else 2))
            expected, got = stage_cycles(jobs, engine), measured.stages[index]
            print(f"{kind.name:6} {rows} {'+'.join(names):20} {expected} {got}")
            assert expected == pytest.approx(got, rel=TOLERANCE)
