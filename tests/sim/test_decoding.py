# SPDX-License-Identifier: Apache-2.0
"""The accelerator's RTL decodes the golden model's tokens and bits."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from speq.host.image import model_image
from speq.host.image_file import read_image, write_image
from speq.host.layout import Region
from speq.host.meter import Meter
from speq.host.registers import speculation_words
from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.register_map import STATES
from speq.hw.engine_config import EngineConfig
from speq.model import speculation, vector_ops
from speq.model.checkpoint import ARCHITECTURES, Model, linear_shapes
from speq.model.encoded_file import EncodedModel, read_encoded, sha256, write_encoded
from speq.model.encoder import calibrate, encode_fitted
from speq.model.encoding import encode_linears
from speq.model.format import EncodedTensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.settings import Sampling
from speq.model.speculation import Settings, Step, generate
from speq.sim.gtkwave import groups
from speq.sim.session import board_for, simulated_session, top_verilog
from speq.sim.simulated_board import CHANNELS
from speq.sim.watched_board import WatchedBoard
from tests.host.decoding import (
    COUNTED,
    GUESSING,
    REPETITIVE,
    SEED,
    check,
    check_end,
    system,
)
from tests.host.test_driver import add_counted
from tests.model.drafted import drafted_model
from tests.model.small_models import overflowing, random_tokens
from tests.sim.configurations import FEW, FULL, NARROW

LATENCY = 16
#: Every channel of the memory stalls, and it answers out of order.
STALLED = {"stalls": dict.fromkeys(CHANNELS, 80), "reorder": True, "seed": SEED, "latency": 5}
#: Cycles within which any run here ends.
LIMIT = 2_000_000
#: Cycles of a token of `tiny` on 8 x 16 PEs: at most.
PLAIN_CYCLES = 27_000

Encoded = dict[str, EncodedTensor]


def rtl_session(
    model: Model,
    config: AcceleratorConfig = FEW,
    encoded: Encoded | None = None,
    *,
    capacity: int = 128,
    **memory: object,
) -> Session:
    """A session on the accelerator in the simulator, all layers encoded unless told otherwise."""
    encoded = encode_linears(model) if encoded is None else encoded
    memory = {"latency": LATENCY} | memory
    return simulated_session(model, encoded, config, capacity=capacity, **memory)


def tokens_of(steps: Sequence[Step]) -> list[int]:
    """What they commit."""
    return [token for step in steps for token in step.tokens]


def counts(session: Session, steps: list[Step]) -> dict[str, int]:
    """What the accelerator has counted in a run: what the steps say, which are the golden
    model's."""
    total = dict.fromkeys(COUNTED, 0)
    add_counted(total, session, steps)
    return total


# Small models.


@pytest.fixture(scope="module")
def llama() -> Iterator[Session]:
    """A small model, which decodes one text after the other."""
    with rtl_session(drafted_model("llama", SEED)) as session:
        yield session


def test_an_image_file_behind_a_high_address(tmp_path):
    """All bits, from a file, with addresses of 40 bits and bursts that are cut at both ends."""
    model = drafted_model("llama", SEED)
    path = tmp_path / "model.image"
    settings = Settings(4, threshold=0.25, reranked=4)
    write_image(path, model_image(FEW, model, encode_linears(model), settings=settings))
    image, base = read_image(path), (1 << 39) + 3 * FEW.load_alignment
    memory = Region(base, base + image.size)
    board = board_for(
        model, image.encoded(model), FEW, capacity=image.capacity, base=base, latency=LATENCY
    )
    with Session(model, board=board, memory=memory, image=image) as session:
        steps = check(session, random_tokens(model.config, 6, SEED), image.settings)
        assert counts(session, steps)["draft_passes"]


def test_rows_of_all_kinds_with_stalls_and_reordered_responses():
    """On all channels of the memory, behind more passes over the prompt than one; then without
    drafting."""
    model = drafted_model("llama", SEED)
    prompt = random_tokens(model.config, 3, SEED) * 2
    total = dict.fromkeys(COUNTED, 0)
    with rtl_session(model, **STALLED) as session:
        for settings, count in (
            (Settings(4, policy=GUESSING), 8),
            (Settings(4, 2, 0.5, reranked=2), 5),
            (Settings(4, 0), 2),
        ):
            steps = check(session, prompt, settings, max_tokens=count)
            add_counted(total, session, steps)
    named = ("draft_passes", "verify_passes", "committed", "alternates", "guesses")
    assert all(total[name] for name in named), total


def test_norms_of_heads_windows_and_gelu():
    """Heads that do not fill their tiles, and a window that ends in the prompt."""
    model = drafted_model("gemma3", SEED, head_dim=10)
    with rtl_session(model) as session:
        steps = check(session, random_tokens(model.config, 9, SEED), Settings(4), max_tokens=6)
        counts(session, steps)


def test_sampling(llama):
    sampling, generator = Sampling(0.9, min_p=0.02), torch.Generator().manual_seed(SEED)
    prompt, options = [5, 6, 7], {"sampling": sampling, "generator": generator}
    check(llama, prompt, Settings(4, 3, 0.1, 3), max_tokens=6, **options)


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
    with rtl_session(model, encoded=encoded, capacity=24) as session:
        for start in (prompt, [*prompt[:5], text[number], 6], [10, 11], [12]):
            steps, error = check_end(session, start, settings, max_tokens=6)
            ends.append(error and (error.kind, error.layer, error.position))
            assert error or sum(len(step.tokens) for step in steps) == 6
    assert ends[0] == ("verify", layer, len(prompt) + number) and None in ends
    if layer == "block.0.values":
        assert ends[1] == ("prompt", layer, 5)


def test_vector_work_is_the_accelerators(llama, monkeypatch):
    """All that vector_ops computes: decoding needs none of it in Python."""
    prompt, options = [1, 2, 3], {"max_tokens": 4, "settings": Settings(4, 2)}
    expected = tokens_of(list(llama.golden(prompt, **options)))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("vector work in Python")

    work = {f for _, f in inspect.getmembers(vector_ops, inspect.isfunction)}
    for module in [each for name, each in sys.modules.items() if name.startswith("speq.")]:
        for name, value in [*vars(module).items()]:
            if inspect.isfunction(value) and value in work:
                monkeypatch.setattr(module, name, refuse)
    with pytest.raises(AssertionError, match="vector work in Python"):
        list(llama.golden(prompt, **options))
    assert tokens_of(list(llama.generate(prompt, **options))) == expected


def test_runs_that_are_stopped_in_the_middle_of_vector_work(llama):
    """The next run is right."""
    registers, random = llama.driver.registers, np.random.default_rng(SEED)
    for _ in range(3):
        run = llama.generate([1, 2, 3], max_tokens=30, settings=Settings(4, 1))
        next(run)
        while True:
            assert not llama.board.wait_interrupt(int(random.integers(1, 100)))
            before = registers["VECTOR_CYCLES"]
            if registers["VECTOR_CYCLES"] > before:
                break
        run.close()
        assert registers["STATUS"] == STATES["IDLE"][0]
    check(llama, [1, 2, 3, 4, 5], Settings(4, 2), max_tokens=3)


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_from_the_prompt_to_the_last_token_needs_no_host(llama, stops):
    """Neither an answer nor a memory access: tokens of the prompt before it, those in the ring
    behind it, up to a stop token or as many as there should be."""
    driver, board = llama.driver, llama.board
    settings, count = Settings(4, choices=3, policy=GUESSING), 12
    prompt = random_tokens(llama.model.config, 3, SEED) * 3
    options = {"max_tokens": count, "settings": settings}
    expected = tokens_of(list(llama.golden(prompt, **options)))
    # Where the text ends, if anything does before its end.
    stop = max(expected[:-2], key=expected.index)
    if stops:
        expected = tokens_of(list(llama.golden(prompt, **options, stop_ids=frozenset([stop]))))
        assert expected[-1] == stop and len(expected) < count
    board.write(driver.layout.text, np.array(prompt[:-1], "<u4"))
    registers = driver.registers
    for name, value in speculation_words(driver.config, settings).items():
        if isinstance(value, tuple):
            registers.write_costs(name, value)
        else:
            registers[name] = value
    registers["HISTORY_LENGTH"] = 0
    for token in prompt:
        registers["HISTORY"] = token
    registers.write_stop_tokens([stop] if stops else [])
    flags = {"speculate": 1, "sample": 0, "truncate": 0, "steps": 0, "move": 1}
    values = {"RUN": flags, "POSITION": 0, "PROMPT_END": len(prompt) - 1, "ROOT": prompt[-1]}
    values |= {"DRAFT_LENGTH": settings.length, "TOKEN_LIMIT": count, "IRQ_STATUS": 7}
    for name, value in values.items():
        registers[name] = value
    registers.command("clear_counters")
    registers.command("start")
    assert board.wait_interrupt(LIMIT)
    assert registers["STATUS"] == STATES["IDLE"][0]
    assert registers["HOST_CYCLES"] == 0
    assert registers["RING_INDEX"] == registers["COMMITTED"] == len(expected)
    assert board.read(driver.layout.ring, 4 * len(expected)).view("<u4").tolist() == expected
    assert registers["POSITION"] == len(prompt) - 1 + len(expected)
    assert registers["ROOT"] == expected[-1]


def test_passes_are_seen_though_no_interrupt_tells_of_them():
    """All of them, in the same cycles in every run."""
    model = drafted_model("llama", SEED)
    prompt = random_tokens(model.config, 6, SEED)
    options = {"max_tokens": 5, "settings": Settings(4, 2, 0.5)}
    encoded, seen = encode_linears(model), []
    for _ in range(2):
        board = board_for(model, encoded, FEW, latency=16)
        watched = WatchedBoard(board, FEW, lambda _: False)
        with Session(model, encoded, watched) as session:
            steps = list(session.generate(prompt, **options))
        seen.append(watched.events)
        counts = {name: len(cycles) for name, cycles in watched.events.items()}
        drafts = sum(step.drafted for step in steps)
        assert counts == {"prompt": 2, "draft": drafts, "verify": len(steps), "step": len(steps)}
        assert drafts and all(cycles == sorted(set(cycles)) for cycles in watched.events.values())
    assert seen[0] == seen[1]


def test_the_layout_of_waves_names_signals_of_the_verilog():
    """As recordings name them: by the instances that they are in."""
    signals, instance = set(), ""
    for line in top_verilog(FEW).splitlines():
        if module := re.match(r"module \\?(speq_top\S*)", line):
            instance = module[1].replace("speq_top", "board.accelerator")
        elif found := re.match(r"  (?:wire|reg) (?:\[\d+:\d+\] )?\\?([^ ;]+)", line):
            signals.add(f"{instance}.{found[1]}")
    named = {trace.signal for group in groups(FEW) for trace in group.traces}
    named = {name for name in named if name.startswith("board.accelerator.")}
    assert named and named <= signals, named - signals


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
    """Speculative, with drafts of 4 bits and then of exact logits, plain from the encoded weights,
    and plain from FP16 weights in memory."""
    architecture, changes = SHAPES[shape]
    model = drafted_model(architecture, SEED, **changes)
    prompt = random_tokens(model.config, 7, SEED)
    rows = config.engine.rows
    drafted = [(rows - 1, 0), (0, 0), (rows - 1, 5)]
    for encoded, runs in ((encode_linears(model), drafted), (None, [(rows - 1, 0)])):
        with rtl_session(model, config, encoded or {}, capacity=24) as session:
            for length, reranked in runs:
                options = {"max_tokens": 8 if length and encoded else 3}
                settings = Settings(rows, length, reranked=reranked)
                steps = check(session, prompt, settings, **options)
                made = counts(session, steps)
                assert bool(made["draft_passes"]) == bool(length and encoded)


def test_what_a_pass_leaves_for_later_is_on_chip(llama):
    """Memory behind the window of the scratch memory keeps its content. Without a window all is
    written there, bits are the same, and it takes more cycles."""
    driver, registers = llama.driver, llama.driver.registers
    window = driver.layout.scratch
    prompt, settings = random_tokens(llama.model.config, 6, SEED), Settings(4, 2)
    mark = np.arange(driver.config.scratch, dtype=np.uint32).astype(np.uint8)
    cycles = []
    for base in (window.start, 0):
        registers["SCRATCH"] = base
        llama.board.write(window.start, mark)
        check(llama, prompt, settings, max_tokens=4)
        cycles.append(registers["CYCLES"])
        kept = np.array_equal(llama.board.read(window.start, driver.config.scratch), mark)
        assert kept == bool(base)
    registers["SCRATCH"] = window.start
    assert cycles[0] < cycles[1]


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture):
    """Biases, norms of queries and keys, norms behind layers, sliding windows, blocks without
    rotary embedding, factors; behind more rows of prompt than a pass has."""
    model = drafted_model(architecture, SEED)
    with rtl_session(model) as session:
        check(session, random_tokens(model.config, 11, SEED), Settings(4), max_tokens=8)


# `tiny` on 8 x 16 PEs, and on others.


@pytest.fixture(scope="module")
def tiny() -> Iterator[Session]:
    """The model, which decodes one text after the other."""
    with rtl_session(load_model("tiny"), FULL) as session:
        yield session


def decode(session: Session, text: str, settings: Settings, tokens: int) -> dict[str, int]:
    """Decode text and compare steps and counters with the golden model's."""
    prompt = session.model.tokenizer.encode(text)
    return counts(session, check(session, prompt, settings, max_tokens=tokens))


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "memory"),
    [
        (FULL, {}),
        (FEW, STALLED),
        (replace(FULL, lanes=4, weights=NARROW.weights, data=NARROW.data, scratch=0), {}),
        pytest.param(replace(system(EngineConfig(cols=64)), lanes=16), {}, marks=pytest.mark.slow),
    ],
    ids=["8 x 16", "4 x 8 with stalls", "ports of 64 bits, no scratch memory", "8 x 64"],
)
def test_64_tokens_plain_and_speculative(config, memory):
    """All bits and all counts; then rows of all kinds."""
    cycles, total = {}, dict.fromkeys(COUNTED, 0)
    rows = config.engine.rows
    with rtl_session(load_model("tiny"), config, **memory) as session:
        for settings in (Settings(rows, 0), Settings(rows, threshold=1.0)):
            meter = Meter(session.driver)
            made = decode(session, "Once upon a time", settings, 64)
            assert made["committed"] == 64
            later = meter.passes[1:]  # the prompt is in the first
            tokens = sum(each.counters["COMMITTED"] for each in later)
            cycles[settings.length] = sum(each.cycles for each in later) / tokens
        assert made["accepted"] and made["alternate_hits"]
        session.driver.observer = None
        total = decode(session, REPETITIVE, Settings(rows, policy=GUESSING), 24)
    plain, drafted = cycles.values()
    print(f"\ncycles per token: plain {plain:,.0f}, speculative {drafted:,.0f}")
    assert drafted < plain
    if config is FULL:
        assert all(total.values()), total
        assert plain <= PLAIN_CYCLES


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


_TEXTS = [
    (0, 0.0, 4, "Lily had a red ball. She"),
    (1, 0.0, 1, "The"),
    (2, 1e9, 2, "One day, a boy named Tim found a big box in the park"),
    (3, 0.0, 3, "The cat and the dog were"),
    (4, 1.0, 1, "Mom said"),
    (5, math.inf, 4, "Ben"),
    (6, 0.25, 4, "There was a little girl who loved to play with her toys"),
    (7, 0.0, 2, "Once there was a"),
    (7, 0.0, 1, "They"),
]


@pytest.mark.parametrize(
    ("draft_length", "threshold", "choices", "text"),
    [case if case[0] in (2, 5) else pytest.param(*case, marks=pytest.mark.long) for case in _TEXTS],
)
def test_draft_lengths_thresholds_and_choices(tiny, draft_length, threshold, choices, text):
    """Behind prompts of one token and of several passes."""
    settings = Settings(8, draft_length, threshold, choices)
    assert decode(tiny, text, settings, 10)["committed"] == 10


@pytest.mark.parametrize(
    ("reranked", "draft_length", "choices", "threshold"),
    [
        (8, 7, 4, 0.5),
        pytest.param(3, 4, 8, 0.0, marks=pytest.mark.long),
        pytest.param(1, 2, 3, math.inf, marks=pytest.mark.long),
    ],
)
def test_exact_logits_of_the_best_drafted_tokens(tiny, reranked, draft_length, choices, threshold):
    """Chains, margins and alternates are those of exact logits, of as many tiles as they are in."""
    settings = Settings(8, draft_length, threshold, choices, reranked)
    meter = Meter(tiny.driver)
    decode(tiny, "Tom and his dog went to", settings, 12)
    tiny.driver.observer = None
    tiles = [tiles for p in meter.passes for tiles in p.shape.drafts]
    assert 1 <= min(tiles) <= max(tiles) <= reranked


def test_guesses_from_repeated_texts(tiny):
    """Rows of all kinds are verified and accepted, some behind each other, and a step has no draft
    pass: the golden model's tokens, margins, logit bits and counts."""
    settings = Settings(8, policy=GUESSING)
    assert all(decode(tiny, REPETITIVE, settings, 24).values())


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
    with rtl_session(model, FULL, optimised) as session:
        for reranked, choices in ((0, 4), (8, 8)):
            settings = Settings(8, 5, 0.5, choices, reranked)
            assert decode(session, "Tom and his dog went to", settings, 12)["accepted"]


@pytest.mark.long
def test_everything_with_stalls_and_reordered_responses(optimised):
    """On all channels of the memory: 66 tokens, drafts of all lengths, exact logits of 1 to 8
    tokens, rows of all kinds and steps without a draft pass."""
    model, total = load_model("tiny"), dict.fromkeys(COUNTED, 0)
    with rtl_session(model, FULL, optimised, **STALLED) as stalled:
        for length in range(8):
            settings = Settings(8, length, 0.0, 4, 8 - length, policy=GUESSING)
            count = 3 if length == 0 else 9
            text = REPETITIVE if length % 2 else "Tom and his dog went to"
            for name, number in decode(stalled, text, settings, count).items():
                total[name] += number
    assert total["committed"] == 66 and all(total.values()), total
