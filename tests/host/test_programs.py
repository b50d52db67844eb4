# SPDX-License-Identifier: Apache-2.0
"""Programs and what they leave for the host: the driver on the functional model decodes the golden
model's steps and bits with them."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from speq.host.accelerator_model import AcceleratorModel
from speq.host.driver import Driver
from speq.host.image import model_image
from speq.host.inspection import report
from speq.host.layout import exceeded_limits
from speq.host.meter import Meter
from speq.host.programs import ModelLayout
from speq.host.session import Session, accelerator_for
from speq.hw.accelerator_config import PassKind
from speq.hw.control.descriptor import Descriptor, DescriptorKind
from speq.hw.engine_config import EngineConfig
from speq.model import vector_ops
from speq.model.checkpoint import linear_names
from speq.model.encoding import encode_linears
from speq.model.number_format import FormatConfig
from speq.model.settings import Sampling
from speq.model.speculation import Settings
from tests.host.decoding import (
    SEED,
    SMALL,
    assert_same_steps,
    check,
    system,
)
from tests.host.test_driver import make_session
from tests.model.drafted import drafted_model, randomly_scaled
from tests.model.small_models import random_tokens


@pytest.fixture(scope="module")
def qwen() -> Session:
    """A model with biases on 8 rows."""
    model = drafted_model("qwen2", SEED)
    return make_session(model, encode_linears(model), system(replace(SMALL, rows=8)))


# Decoding.


@pytest.mark.parametrize(
    ("architecture", "changes", "config"),
    [
        ("qwen3", {"hidden": 44, "ffn_hidden": 172, "head_dim": 6}, system(lanes=4)),
        (
            "llama",
            {"hidden": 21, "ffn_hidden": 50, "heads": 3, "kv_heads": 3, "head_dim": 2},
            system(EngineConfig(rows=3, cols=4, max_k=300, max_o=300), weights=64, data=64),
        ),
        (
            "granite",
            {"heads": 9, "kv_heads": 3, "head_dim": 10, "vocab_size": 5},
            system(EngineConfig(rows=2, cols=32, max_k=256, max_o=999), data=64, lanes=16),
        ),
        (
            "gemma3",
            {"heads": 6, "kv_heads": 1, "head_dim": 18, "ffn_hidden": 43},
            system(
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
    session = make_session(model, encoded, config, base=3 * config.load_alignment)
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
    session = make_session(model, encode_linears(model), system())
    steps = check(session, random_tokens(model.config, 5, SEED), Settings(4), max_tokens=6)
    assert any(step.drafted for step in steps)


def test_weights_without_an_encoding_and_layers_among_encoded_ones():
    model = drafted_model("qwen3", SEED, hidden=20, ffn_hidden=33, head_dim=6)
    prompt = random_tokens(model.config, 6, SEED)
    check(make_session(model, None, system()), prompt, Settings(4), max_tokens=4)
    encoded = encode_linears(model)
    for name in ("head", "block.0.q_proj", "block.1.down_proj"):
        del encoded[name]
    check(make_session(model, encoded, system()), prompt, Settings(4), max_tokens=4)


def test_sampling_and_heads_that_draft_in_part():
    """With exact logits of the best tokens."""
    model = drafted_model("llama", SEED)
    encoded = randomly_scaled(model, np.random.default_rng(SEED), drafted_outputs=30)
    session = make_session(model, encoded, system())
    for number, settings in enumerate((Settings(4, reranked=4), Settings(4, 3, 0.1, 3))):
        generator = torch.Generator().manual_seed(number)
        options = {"sampling": Sampling(0.9, min_p=0.02), "generator": generator}
        for chosen in ({}, options):
            steps = check(session, [5, 6, 7], settings, **chosen)
            assert sum(step.drafted for step in steps)


def test_a_meter_counts_steps(qwen):
    """What it counts adds up to the counters, the passes over the prompt in the first step."""
    meter = Meter(qwen.driver)
    prompt = random_tokens(qwen.model.config, 10, SEED)
    settings = Settings(8, 3, reranked=2)
    steps = list(qwen.generate(prompt, max_tokens=8, settings=settings))
    counters = qwen.driver.counters()
    qwen.driver.observer = None
    shapes = [p.shape for p in meter.passes]
    assert [(s.rows, len(s.drafts)) for s in shapes] == [(s.rows, s.drafted) for s in steps]
    assert [s.prompt for s in shapes] == [9] + [0] * (len(steps) - 1)
    names = ["step" if s.drafted else "plain" for s in steps]
    assert [s.name for s in shapes] == ["first step", *names[1:]]
    assert all(1 <= tiles <= 2 for s in shapes for tiles in s.drafts)
    for name in ("DESCRIPTORS", "COMMITTED", "DRAFT_PASSES"):
        assert sum(p.counters[name] for p in meter.passes) == counters[name] > 0


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
        text = np.array(prompt[:-1], "<u4")
        assert (qwen.driver.layout.text, text.tobytes()) in written and len(written) <= 2
        written.clear()
    assert hits


@pytest.mark.parametrize("architecture", ["gemma3", "granite"])
def test_programs_ask_no_host(architecture):
    model = drafted_model(architecture, SEED)
    layout = ModelLayout(system(), model.config, linear_names(model.config), 20)
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
    """The descriptors in another order that the accelerator may carry them out in: those of one
    class as early as they may, the last one first, and of the other class only the next one when
    none of these is able to start."""
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
        ahead = [i for i in able if (program[i].kind is DescriptorKind.VECTOR) is vectors_first]
        order.append(max(ahead) if ahead else min(able))
    return [program[i] for i in order]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma3", {"heads": 4, "kv_heads": 2}),
        ("granite", {"heads": 4, "kv_heads": 2}),
        # Layers are in pieces, and vector work is behind other products than the last one.
        ("llama", {"heads": 6, "kv_heads": 3, "hidden": 96, "ffn_hidden": 256, "blocks": 2}),
    ],
    ids=["gemma3", "granite", "pieces"],
)
@pytest.mark.parametrize("vectors_first", [False, True])
def test_what_may_overlap_has_no_order(architecture, changes, vectors_first):
    """Programs whose descriptors are in any order that they may be carried out in give the same."""
    model = drafted_model(architecture, SEED, **changes)
    session = make_session(model, encode_linears(model), system())
    layout = session.driver.layout
    for kind in PassKind:
        program = layout.program(kind)
        other = reordered(program, vectors_first)
        # What moves entries has no products that may come first.
        assert other != program or (kind is PassKind.MOVE and not vectors_first)
        content = b"".join(descriptor.pack() for descriptor in other)
        session.board.write(layout.programs[kind], content)
    check(session, random_tokens(model.config, 9, SEED), Settings(4), max_tokens=6)


def test_programs_of_any_pass_have_the_length_of_their_part():
    """Of draft passes with RERANK."""
    model = drafted_model("gemma3", SEED)
    layout = ModelLayout(system(), model.config, linear_names(model.config), 20)
    parts = {part.name: part.size for part in layout.parts if part.name in ("single", "draft")}
    assert parts["draft"] == 64 * len(layout.program(PassKind.DRAFT, reranked=2))
    assert parts["single"] == 64 * len(layout.program(PassKind.SINGLE))


def test_models_with_too_many_query_heads_are_refused():
    model = drafted_model("llama", SEED, heads=6, kv_heads=2)
    config = replace(system(), query_heads=4)
    with pytest.raises(ValueError, match="has 6 query heads; the accelerator's query_heads is 4"):
        make_session(model, None, config)
    make_session(model, None, replace(config, query_heads=8))
    (excess,) = exceeded_limits(config, model.config, 20)
    assert (excess.parameter, excess.size, excess.limit) == ("query_heads", 6, 4)
    # Heads begin at a tile: 6 of 8 outputs each.
    small = {"vocab_size": 40, "ffn_hidden": 40, "context": 30}
    wide = drafted_model("llama", SEED, heads=6, kv_heads=2, head_dim=6, **small)
    few = system(replace(SMALL, max_o=47))
    with pytest.raises(ValueError, match="width of all heads is 48; the accelerator's largest O"):
        make_session(wide, None, few)
    make_session(wide, None, replace(few, engine=replace(few.engine, max_o=48)))


def test_accelerators_without_a_vector_unit_are_refused():
    """By all that would make something for them."""
    model, config = drafted_model("llama", SEED), system(lanes=0)
    message = "lanes is 0; only an accelerator with a vector unit can decode a model: take 4 to 64"
    for refused in (
        lambda: ModelLayout(config, model.config, [], 20),
        lambda: model_image(config, model),
        lambda: Driver(AcceleratorModel(config, 1 << 20), model),
        lambda: accelerator_for(model, {}, 4, 8, 20, lanes=0),
        lambda: report(model, config),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_data_ports_that_are_too_wide_for_small_heads_are_refused():
    model = drafted_model("llama", SEED, heads=2, kv_heads=2, head_dim=6)
    wide = system(EngineConfig(rows=2, cols=32, max_k=256))
    with pytest.raises(ValueError, match=r"have 48 bytes, .* data port \(64\): it needs"):
        make_session(model, None, wide)
    session = make_session(model, None, system(EngineConfig(rows=2, cols=32), data=128))
    check(session, [1, 2, 3, 4], Settings(2), max_tokens=2)
