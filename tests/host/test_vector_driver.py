# SPDX-License-Identifier: Apache-2.0
"""The driver on the functional model of an accelerator with a vector unit: the golden model's steps
and bits, from programs that need no host."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from speq.host.accelerator_model import AcceleratorModel
from speq.host.layout import exceeded_limits
from speq.host.layouts import memory_layout
from speq.host.meter import Meter
from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.descriptor import Descriptor, DescriptorKind
from speq.hw.control.register_map import STATES
from speq.hw.engine_config import EngineConfig
from speq.model import vector_ops
from speq.model.checkpoint import ARCHITECTURES, linear_names
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.settings import Sampling
from speq.model.speculation import Settings
from tests.host.decoding import (
    COUNTED,
    GUESSING,
    REPETITIVE,
    SEED,
    SMALL,
    assert_same_steps,
    check,
    check_conversation,
    check_end,
    check_lowest_positions,
    check_where_it_ends,
    system,
)
from tests.host.test_driver import add_counted, make_session
from tests.model.drafted import drafted_model, randomly_scaled
from tests.model.small_models import overflowing, random_tokens


def vector_system(engine: EngineConfig = SMALL, lanes: int = 8, **ports: int) -> AcceleratorConfig:
    """A configuration with a vector unit; ports as of `system`."""
    return replace(system(engine, **ports), lanes=lanes)


@pytest.fixture(scope="module")
def qwen() -> Session:
    """A model with biases on 8 rows."""
    model = drafted_model("qwen2", SEED)
    return make_session(model, encode_linears(model), vector_system(replace(SMALL, rows=8)))


# Decoding.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture):
    """Biases, norms of queries and keys, norms behind layers, sliding windows (6 positions),
    blocks without rotary embedding, factors; behind more rows of prompt than a pass has."""
    model = drafted_model(architecture, SEED)
    session = make_session(model, encode_linears(model), vector_system())
    check(session, random_tokens(model.config, 11, SEED), Settings(4), max_tokens=8)


@pytest.mark.parametrize(
    ("architecture", "changes", "config"),
    [
        ("qwen3", {"hidden": 44, "ffn_hidden": 172, "head_dim": 6}, vector_system(lanes=4)),
        (
            "llama",
            {"hidden": 21, "ffn_hidden": 50, "heads": 3, "kv_heads": 3, "head_dim": 2},
            vector_system(
                EngineConfig(rows=3, cols=4, max_k=300, max_o=300), 4, weights=64, data=64
            ),
        ),
        (
            "granite",
            {"heads": 9, "kv_heads": 3, "head_dim": 10, "vocab_size": 5},
            vector_system(EngineConfig(rows=2, cols=32, max_k=256, max_o=999), 16, data=64),
        ),
        (
            "gemma3",
            {"heads": 6, "kv_heads": 1, "head_dim": 18, "ffn_hidden": 43},
            vector_system(
                EngineConfig(rows=8, cols=16, format=FormatConfig(32, 1), draft_rows=3, max_k=256),
                weights=64,
            ),
        ),
    ],
    ids=["norms of odd heads", "narrow", "shared by three", "shared by six"],
)
def test_any_dimensions(architecture, changes, config):
    model = drafted_model(architecture, SEED, **changes)
    encoded = encode_linears(model, config.engine.format)
    session = make_session(model, encoded, config, base=3 * config.alignment)
    prompt = random_tokens(model.config, 7, SEED)
    check(session, prompt, Settings(config.engine.rows), max_tokens=6)


def test_padding_of_heads_is_in_no_norm():
    """Draft weights are never 0, nor are padding's: beside small ones that counts."""
    model = drafted_model("qwen3", SEED, head_dim=6, norm_eps=1e-10)
    small = {
        name: w * 2.0**-13 if name.endswith(("q_proj", "k_proj")) else w
        for name, w in model.weights.items()
    }
    model = replace(model, weights=small)
    session = make_session(model, encode_linears(model), vector_system())
    steps = check(session, random_tokens(model.config, 5, SEED), Settings(4), max_tokens=6)
    assert any(step.drafted for step in steps)


def test_weights_without_an_encoding_and_layers_among_encoded_ones():
    model = drafted_model("qwen3", SEED, hidden=20, ffn_hidden=33, head_dim=6)
    prompt = random_tokens(model.config, 6, SEED)
    check(make_session(model, None, vector_system()), prompt, Settings(4), max_tokens=4)
    encoded = encode_linears(model)
    for name in ("head", "block.0.q_proj", "block.1.down_proj"):
        del encoded[name]
    check(make_session(model, encoded, vector_system()), prompt, Settings(4), max_tokens=4)


@pytest.mark.parametrize("settings", [Settings(4, 2, 0.1), Settings(4, policy=GUESSING)])
def test_runs_that_continue_earlier_ones(settings):
    """With alternates, whose entries are moved, and sliding windows."""
    model = drafted_model("gemma3", SEED)
    check_conversation(make_session(model, encode_linears(model), vector_system()), settings)


def test_rows_of_all_kinds_are_counted(qwen):
    """Chains, alternates, guesses and steps without a draft; the counters agree."""
    total = dict.fromkeys(COUNTED, 0)
    for i in range(3):
        prompt = random_tokens(qwen.model.config, 2 + i, SEED + i) * (4 - i)
        settings = Settings(8, choices=2 + i, policy=GUESSING)
        add_counted(total, qwen, check(qwen, prompt, settings, max_tokens=16))
    add_counted(total, qwen, check(qwen, [1, 2, 3], Settings(8, 3)))
    assert all(total[name] for name in COUNTED if name != "guess_hits")


def test_sampling_and_heads_that_draft_in_part():
    """With exact logits of the best tokens."""
    model = drafted_model("llama", SEED)
    encoded = randomly_scaled(model, np.random.default_rng(SEED), drafted_outputs=30)
    session = make_session(model, encoded, vector_system())
    for number, settings in enumerate((Settings(4, reranked=4), Settings(4, 3, 0.1, 3))):
        generator = torch.Generator().manual_seed(number)
        options = {"sampling": Sampling(0.9, min_p=0.02), "generator": generator}
        for chosen in ({}, options):
            steps = check(session, [5, 6, 7], settings, **chosen)
            assert sum(step.drafted for step in steps)


def test_tiny():
    model = load_model("tiny")
    config = vector_system(EngineConfig(rows=8, cols=16, max_k=512))
    session = make_session(model, encode_linears(model), config)
    prompt = model.tokenizer.encode(REPETITIVE)
    total = dict.fromkeys(COUNTED, 0)
    add_counted(total, session, check(session, prompt, Settings(8, policy=GUESSING), max_tokens=24))
    assert all(total.values())


def test_a_meter_counts_passes_over_the_prompt_and_steps(qwen):
    """What it counts adds up to the counters; of the prompt's passes these are cleared."""
    meter = Meter(qwen.driver)
    prompt = random_tokens(qwen.model.config, 10, SEED)
    settings = Settings(8, 3, reranked=2)
    steps = list(qwen.generate(prompt, max_tokens=8, settings=settings))
    counters = qwen.driver.counters()
    qwen.driver.observer = None
    single, decoding = meter.passes[:2], meter.passes[2:]
    assert [(p.shape.name, p.shape.rows, p.shape.position) for p in single] == [
        ("prefill", 8, 0), ("prefill", 1, 8)
    ]  # fmt: skip
    assert all(p.counters["DESCRIPTORS"] for p in single)
    shapes = [p.shape for p in decoding]
    assert [(s.rows, len(s.drafts)) for s in shapes] == [(s.rows, s.drafted) for s in steps]
    assert [s.name for s in shapes] == ["step" if s.drafted else "plain" for s in steps]
    assert all(1 <= tiles <= 2 for s in shapes for tiles in s.drafts)
    for name in ("DESCRIPTORS", "COMMITTED", "DRAFT_PASSES"):
        assert sum(p.counters[name] for p in decoding) == counters[name] > 0


# What is left for the host.


def test_the_driver_does_no_vector_work(qwen, monkeypatch):
    """No function of vector work but those that the functional model has bound is called while the
    driver decodes."""
    prompt = random_tokens(qwen.model.config, 10, SEED)
    options = {"max_tokens": 6, "settings": Settings(8)}
    expected = list(qwen.golden(prompt, **options))

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("vector work in the driver")

    names = [name for name in vars(vector_ops) if not name.startswith("_") and name != "ranked"]
    work = {getattr(vector_ops, name) for name in names if callable(getattr(vector_ops, name))}
    own = ("vector_ops", "vector_model", "accelerator_model")
    replaced = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("speq.") and not name.endswith(own):
            for attribute, value in list(vars(module).items()):
                if callable(value) and value in work:
                    monkeypatch.setattr(module, attribute, forbidden)
                    replaced.add(attribute)
    assert {"rms_norm", "rotate", "softmax_weights", "gated", "normalize"} <= replaced
    with pytest.raises(AssertionError, match="vector work"):
        next(qwen.golden(prompt, **options))
    assert_same_steps(list(qwen.generate(prompt, **options)), expected)


def test_the_host_writes_nothing_but_tokens_of_the_prompt(qwen, monkeypatch):
    """Not even when entries of alternates are accepted."""
    written: list[tuple[int, bytes]] = []
    write = AcceleratorModel.write

    def noted(board: AcceleratorModel, address: int, values: np.ndarray) -> None:
        written.append((address, values.tobytes()))
        write(board, address, values)

    prompt = random_tokens(qwen.model.config, 11, SEED)
    hits = 0
    for _ in range(2):  # the first run writes the program of its draft passes
        monkeypatch.setattr(AcceleratorModel, "write", noted)
        steps = list(qwen.generate(prompt, max_tokens=30, settings=Settings(8, 3)))
        monkeypatch.undo()
        hits += sum(step.alternate_hit for step in steps)
        text = qwen.driver.layout.text
        tokens = np.array(prompt, "<u4")
        expected = [(text, tokens[:8].tobytes()), (text + 32, tokens[8:10].tobytes())]
        assert written[-2:] == expected and len(written) <= 3
        written.clear()
    assert hits


@pytest.mark.parametrize("architecture", ["gemma3", "granite"])
def test_programs_ask_no_host(architecture):
    model = drafted_model(architecture, SEED)
    layout = memory_layout(vector_system(), model.config, linear_names(model.config), 20)
    for kind in PassKind:
        kinds = [descriptor.kind for descriptor in layout.program(kind, reranked=2)]
        assert DescriptorKind.HOST not in kinds and DescriptorKind.VECTOR in kinds
        assert kinds[-1] is DescriptorKind.END
        assert (DescriptorKind.RERANK in kinds) == (kind is PassKind.DRAFT)
        products = sum(
            bool(layout.product_at(kind, layout.programs[kind] + 64 * i))
            for i, each in enumerate(kinds)
            if each not in (DescriptorKind.VECTOR, DescriptorKind.END)
        )
        assert products == len(kinds) - kinds.count(DescriptorKind.VECTOR) - 1


def reordered(program: list[Descriptor], vectors_first: bool) -> list[Descriptor]:
    """The descriptors in another order that the accelerator may carry them out in: behind those
    that each waits for the last one first, of one class before the other's."""
    always = (DescriptorKind.ARGMAX, DescriptorKind.RERANK, DescriptorKind.END)
    places: tuple[list[int], list[int]] = ([], [])  # products, vector work
    finished, needed = [0, 0], []
    for i, each in enumerate(program):
        own = each.kind is DescriptorKind.VECTOR
        if each.kind in always:
            finished = [len(places[0]), len(places[1])]
        if each.wait:
            finished[own] = len(places[own])
        if each.behind:
            behind = len(places[not own]) - (each.behind - 1)
            finished[not own] = max(finished[not own], behind)
        needed.append({*places[0][: finished[0]], *places[1][: finished[1]]})
        places[own].append(i)
    order: list[int] = []
    while len(order) < len(program):
        able = [i for i, needs in enumerate(needed) if i not in order and needs <= {*order}]
        # What ranks holds up all behind it.
        able = [
            i
            for i in able
            if not any(program[j].kind in always for j in range(i) if j not in order)
        ]
        order.append(
            max(
                able, key=lambda i: ((program[i].kind is DescriptorKind.VECTOR) is vectors_first, i)
            )
        )
    return [program[i] for i in order]


@pytest.mark.parametrize("architecture", ["gemma3", "granite"])
@pytest.mark.parametrize("vectors_first", [False, True])
def test_what_may_overlap_has_no_order(architecture, vectors_first):
    """Programs whose descriptors are in any order that they may be carried out in give the same."""
    model = drafted_model(architecture, SEED, heads=4, kv_heads=2)
    session = make_session(model, encode_linears(model), vector_system())
    layout = session.driver.layout
    moved = 0
    for kind in PassKind:
        program = layout.program(kind)
        other = reordered(program, vectors_first)
        moved += other != program
        content = b"".join(descriptor.pack() for descriptor in other)
        session.board.write(layout.programs[kind], content)
    assert moved == len(PassKind)
    check(session, random_tokens(model.config, 9, SEED), Settings(4), max_tokens=6)


def test_programs_of_any_pass_have_the_length_of_their_part():
    """Of draft passes with RERANK."""
    model = drafted_model("gemma3", SEED)
    layout = memory_layout(vector_system(), model.config, linear_names(model.config), 20)
    parts = {part.name: part.size for part in layout.parts if part.name in ("single", "draft")}
    assert parts["draft"] == 64 * len(layout.program(PassKind.DRAFT, reranked=2))
    assert parts["single"] == 64 * len(layout.program(PassKind.SINGLE))


def test_models_with_too_many_query_heads_are_refused():
    model = drafted_model("llama", SEED, heads=6, kv_heads=2)
    config = replace(vector_system(), query_heads=4)
    with pytest.raises(ValueError, match="has 6 query heads; the accelerator's query_heads is 4"):
        make_session(model, None, config)
    make_session(model, None, replace(config, query_heads=8))
    (excess,) = exceeded_limits(config, model.config, 20)
    assert (excess.parameter, excess.size, excess.limit) == ("query_heads", 6, 4)
    assert not exceeded_limits(replace(config, lanes=0), model.config, 20)
    # Heads begin at a tile: 6 of 8 outputs each.
    small = {"vocab_size": 40, "ffn_hidden": 40, "context": 30}
    wide = drafted_model("llama", SEED, heads=6, kv_heads=2, head_dim=6, **small)
    few = vector_system(replace(SMALL, max_o=47))
    with pytest.raises(ValueError, match="width of all heads is 48; the accelerator's largest O"):
        make_session(wide, None, few)
    make_session(wide, None, replace(few, lanes=0))


def test_data_ports_that_are_too_wide_for_small_heads_are_refused():
    model = drafted_model("llama", SEED, heads=2, kv_heads=2, head_dim=6)
    wide = vector_system(EngineConfig(rows=2, cols=32, max_k=256))
    with pytest.raises(ValueError, match=r"have 48 bytes, .* data port \(64\): it needs"):
        make_session(model, None, wide)
    session = make_session(model, None, vector_system(EngineConfig(rows=2, cols=32), data=128))
    check(session, [1, 2, 3, 4], Settings(2), max_tokens=2)


# Results that are not finite.


@pytest.mark.parametrize(
    "layer",
    ["block.0.q_proj", "block.1.scores of q", "block.1.scores of k", "block.0.values",
     "block.1.values", "block.1.down_proj", "head"],
)  # fmt: skip
def test_results_that_are_not_finite_end_decoding(layer):
    """Where the golden model ends, with the same error: in the prompt, at its end, and later."""
    model, prompt = overflowing(drafted_model("llama", SEED), 5, layer), [1, 2, 3, 4, 5, 6, 7]
    texts = (
        (prompt, "prompt", 4),  # the first row of a batch
        (prompt[1:], "prompt", 3),  # the last
        (prompt[:5], "verify", 4),
    )
    check_where_it_ends(make_session(model, encode_linears(model), vector_system()), layer, texts)


def test_the_lowest_position_of_a_prompt_is_named():
    """Of tokens in one batch; a later one fails in an earlier product."""
    model = overflowing(drafted_model("llama", SEED), 7, "block.0.values")
    model = overflowing(model, 5, "block.1.values", axis=1)
    session = make_session(model, encode_linears(model), vector_system())
    check_lowest_positions(
        session, (([1, 2, 5, 7, 3], 2), ([7, 5, 3], 0), ([1, 2, 3, 4, 9, 5, 7, 3], 5))
    )


def test_steps_whose_drafts_are_not_finite_are_repeated():
    """Behind draft and verify passes; decoding ends where the golden model's does."""
    base = drafted_model("llama", SEED, blocks=1)
    settings = Settings(4, threshold=0.1)
    prompt = random_tokens(base.config, 4, SEED)
    repeated = ended = False
    for token in range(64):
        model = overflowing(base, token, "block.0.down_proj")
        session = make_session(model, encode_linears(model), vector_system())
        steps, error = check_end(session, prompt, settings, max_tokens=6)
        repeated |= any(step.repeated for step in steps)
        ended |= error is not None
        assert session.driver.registers["STATUS"] == STATES["IDLE"][0]
        if repeated and ended:
            return
    pytest.fail(f"SPEQ_SEED={SEED}: repeated: {repeated}, ended: {ended}")


def test_runs_of_other_drivers_and_those_that_nobody_finishes(qwen):
    """A driver may find the accelerator in the middle of a run."""
    steps = qwen.generate([1, 2, 3], max_tokens=20, settings=Settings(8, 2))
    next(steps)
    assert qwen.driver.registers["STATUS"] != STATES["IDLE"][0]
    assert isinstance(qwen.board, AcceleratorModel)
    second = Session(qwen.model, qwen.encoded, qwen.board)
    assert second.driver.registers["STATUS"] == STATES["IDLE"][0]
    check(second, [1, 2, 3], Settings(8, 2), max_tokens=4)
    steps.close()
    check(qwen, [1, 2, 3], Settings(8, 2), max_tokens=4)
