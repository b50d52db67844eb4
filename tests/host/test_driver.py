# SPDX-License-Identifier: Apache-2.0
"""The driver on the accelerator's functional model: the golden model's tokens and bits, and errors.

What the driver writes and reads is only bytes and registers here as on the RTL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speq.host.accelerator_model import AcceleratorModel
from speq.host.checks import default_capacity
from speq.host.driver import Driver
from speq.host.layout import Region
from speq.host.registers import Registers, read_configuration, threshold_bits
from speq.host.run_control import AcceleratorError
from speq.host.session import Session, memory_size
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.descriptor import DESCRIPTOR, DESCRIPTOR_BYTES, Descriptor, DescriptorKind
from speq.hw.control.register_map import ANSWERS, MAX_STOP_TOKENS, STATES
from speq.hw.engine_config import EngineConfig, Mode
from speq.model import speculation
from speq.model.checkpoint import ARCHITECTURES, Model
from speq.model.encoding import encode_linears
from speq.model.format import EncodedTensor, encode
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.settings import NO_GUESS, Policy
from speq.model.speculation import Settings, Statistics, Step, generate
from speq.model.transformer import NonFiniteError
from tests.host.decoding import (
    COUNTED,
    GUESSING,
    REPETITIVE,
    SEED,
    SMALL,
    TOKENS,
    assert_same_steps,
    bits,
    check,
    check_conversation,
    check_end,
    check_lowest_positions,
    check_resumed,
    check_where_it_ends,
    system,
)
from tests.model.drafted import drafted_model
from tests.model.small_models import OVERFLOWS, overflowing, random_tokens


def make_session(
    model: Model, encoded: dict[str, EncodedTensor] | None, config: AcceleratorConfig, base: int = 0
) -> Session:
    """A session on a functional model whose memory ends where the model does."""
    capacity = default_capacity(config, model.config)
    size = memory_size(config, model, encoded or {}, capacity, base)
    board = AcceleratorModel(config, size, base)
    board.write(base, np.random.default_rng(SEED).integers(0, 256, size, np.uint8))
    return Session(model, encoded, board, memory=Region(base, base + size))


# Decoding.


@pytest.fixture(scope="module")
def llama() -> Session:
    """A small model on 8 rows."""
    model = drafted_model("llama", SEED)
    encoded = encode_linears(model)
    engine = replace(SMALL, rows=8)
    return make_session(model, encoded, system(engine))


@pytest.mark.parametrize("draft_length", range(8))
def test_steps_are_the_golden_models(llama, draft_length):
    """Every draft length, every number of choices, thresholds from never to always."""
    steps = []
    for choices, threshold in ((1, 0.0), (2, 0.5), (3, 0.1), (4, math.inf), (4, 0.0)):
        settings = Settings(8, draft_length, threshold, choices=choices)
        prompt = random_tokens(llama.model.config, 1 + choices, SEED + draft_length)
        steps += check(llama, prompt, settings)
    assert max(step.drafted for step in steps) == draft_length


@pytest.mark.parametrize("draft_length", range(8))
def test_reranked_drafts_are_the_golden_models(llama, draft_length):
    """Every number of candidates, more or fewer than choices, one program behind the other."""
    steps = []
    counts = range(1 + draft_length % 2, 9, 2)
    for reranked in (*counts, 0):
        choices = 1 + (reranked // 2 + draft_length) % 4
        settings = Settings(8, draft_length, 0.1, choices, reranked)
        prompt = random_tokens(llama.model.config, 2, SEED + reranked)
        steps += check(llama, prompt, settings, max_tokens=4)
    margins = [margin for step in steps for margin in step.margins]
    assert (math.inf in margins) == (draft_length > 0 and 1 in counts)
    assert any(0 < margin < math.inf for margin in margins) == bool(draft_length)


def test_a_candidate_that_is_off_by_one_column_is_found(llama, monkeypatch):
    """What the steps are compared with tells the logits of neighbours apart."""
    rerank = AcceleratorModel._rerank

    def wrong(board, fields, address):
        logits = board._logits
        board._logits = logits.roll(1, dims=1)
        rerank(board, fields, address)

    monkeypatch.setattr(AcceleratorModel, "_rerank", wrong)
    with pytest.raises(AssertionError, match="SPEQ_SEED"):
        check(llama, [1, 2], Settings(8, 3, reranked=4))


def test_heads_that_are_not_encoded_are_exact_as_they_are():
    model = drafted_model("llama", SEED)
    encoded = encode_linears(model)
    del encoded["head"]
    session = make_session(model, encoded, system())
    for reranked in (1, 3):
        check(session, [1, 2], Settings(4, reranked=reranked))


def test_alternates_and_chains_are_accepted_and_counted(llama):
    """What the tests above compare does happen; the accelerator's counters agree."""
    total = dict.fromkeys(COUNTED, 0)
    for i in range(8):
        prompt = random_tokens(llama.model.config, 3, SEED + i)
        add_counted(total, llama, check(llama, prompt, Settings(8, 3)))
    for name, count in total.items():
        assert (count > 0) == (name not in ("guesses", "guess_hits", "free_steps"))


def add_counted(total: dict[str, int], session: Session, steps: list[Step]) -> None:
    """Add what the accelerator has counted in a run, which must be what the steps say."""
    statistics = Statistics()
    for step in steps:
        statistics.add(step)
    counters = session.driver.counters()
    for name, counter in COUNTED.items():
        assert counters[counter] == getattr(statistics, name), name
        total[name] += counters[counter]


@pytest.mark.parametrize(("rows", "history"), [(8, 8), (4, 16)])
def test_guesses_from_repeated_texts(rows, history):
    """Behind chains, behind alternates and without any draft; the history is full soon. Chains
    end where they cost too much, and the token limit ends guesses."""
    model = drafted_model("llama", SEED)
    config = replace(system(replace(SMALL, rows=rows)), history=history)
    session = make_session(model, encode_linears(model), config)
    total = dict.fromkeys(COUNTED, 0)
    for i, guess_limit in enumerate((0, 20, 255, 20)):
        prompt = random_tokens(model.config, 2 + i, SEED + i) * (4 - i)
        policy = replace(GUESSING, guess_limit=guess_limit, limit=(150, 150, 30, 0)[i])
        settings = Settings(rows, choices=2 + i, policy=policy, history=history)
        for limit in (2, 16):
            add_counted(total, session, check(session, prompt, settings, max_tokens=limit))
    assert total["guesses"] and total["free_steps"] and total["draft_passes"]


def test_a_policy_that_guesses_nothing_needs_no_history(llama):
    """Without a draft, too, which is plain decoding."""
    session = make_session(llama.model, llama.encoded, replace(system(), history=0))
    settings = Settings(4, policy=replace(GUESSING, guess_costs=(NO_GUESS,) * 4))
    check(session, [1, 2, 1, 2], settings)
    with pytest.raises(ValueError, match="this accelerator has no history; take one whose"):
        list(session.generate([1], max_tokens=4, settings=replace(settings, policy=GUESSING)))
    plain = make_session(llama.model, None, system())
    check(plain, [1, 2, 1, 2, 1], Settings(4, policy=GUESSING))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", Settings(4)),
        ("gemma3", Settings(4, 2, 0.1)),
        ("gemma3", Settings(4, policy=GUESSING)),
    ],
)
def test_runs_that_continue_earlier_ones(architecture, settings):
    """With alternates, whose entries are moved, and sliding windows."""
    model = drafted_model(architecture, SEED)
    check_conversation(make_session(model, encode_linears(model), system()), settings)


def test_a_stop_token_ends_the_text_that_is_kept(llama):
    """Not what was accepted behind it."""
    model = llama.model
    prompt = random_tokens(model.config, 3, SEED)
    options = {"max_tokens": TOKENS, "settings": Settings(8)}
    before, stop = set(), frozenset()
    for step in llama.golden(prompt, **options):
        if len(step.tokens) > 1 and step.tokens[0] not in before:
            stop = frozenset(step.tokens[:1])
        before.update(step.tokens)
    assert stop, f"SPEQ_SEED={SEED}"
    session = make_session(model, llama.encoded, system(replace(SMALL, rows=8)))
    text = []
    for decode in (session.generate, session.golden):
        steps = decode(prompt, **options, stop_ids=stop, resume=True)
        text = [token for step in steps for token in step.tokens]
        assert text[-1] in stop
    following = [*prompt, *text, 5, 6]
    check_resumed(session, following, Settings(8), known=len(prompt) + len(text) - 1)


def test_plain_decoding_of_weights_without_encoding():
    model = drafted_model("llama", SEED, hidden=20, ffn_hidden=33)
    session = make_session(model, None, system())
    steps = check(session, random_tokens(model.config, 6, SEED), Settings(4))
    assert len(steps) == TOKENS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture):
    """Biases, norms of queries and keys, norms behind layers, sliding windows (6 positions),
    blocks without rotary embedding, factors."""
    model = drafted_model(architecture, SEED)
    encoded = encode_linears(model)
    session = make_session(model, encoded, system())
    for length in (1, 2, 11):
        prompt = random_tokens(model.config, length, SEED)
        check(session, prompt, Settings(4), max_tokens=12)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": 44, "ffn_hidden": 172, "head_dim": 6, "vocab_size": 61},
        {"hidden": 21, "ffn_hidden": 50, "heads": 3, "kv_heads": 3, "head_dim": 2},
        {"heads": 9, "kv_heads": 3, "head_dim": 10, "vocab_size": 5},
        {"heads": 6, "kv_heads": 1, "head_dim": 18, "tied_head": True},
        {"blocks": 1, "heads": 1, "kv_heads": 1},
    ],
    ids=["odd sizes", "three KV heads", "shared by three", "shared by six", "one block"],
)
@pytest.mark.parametrize(
    "config",
    [
        system(),
        system(EngineConfig(rows=3, cols=4, max_k=300, max_o=300), weights=64, data=64),
        replace(system(EngineConfig(rows=2, cols=32, max_k=256, max_o=999), data=64), scratch=4096),
        system(
            EngineConfig(rows=8, cols=16, format=FormatConfig(32, 1), draft_rows=3, max_k=256),
            weights=64,
        ),
        replace(system(), scratch=0),
    ],
    ids=["4x8", "3x4 narrow", "2x32 small scratch", "8x16 group 32", "4x8 no scratch"],
)
def test_any_dimensions(config, changes):
    model = drafted_model("llama", SEED, **changes)
    encoded = encode_linears(model, config.engine.format)
    session = make_session(model, encoded, config, base=3 * config.load_alignment)
    prompt = random_tokens(model.config, 7, SEED)
    check(session, prompt, Settings(config.engine.rows), max_tokens=9)


def test_layers_without_an_encoding_are_plain_in_draft_passes_too():
    model = drafted_model("qwen2", SEED)
    encoded = encode_linears(model)
    for name in ("head", "block.0.k_proj", "block.1.down_proj"):
        del encoded[name]
    session = make_session(model, encoded, system())
    check(session, random_tokens(model.config, 5, SEED), Settings(4))


def test_tiny():
    model = load_model("tiny")
    encoded = encode_linears(model)
    engine = EngineConfig(rows=8, cols=16, max_k=512)
    session = make_session(model, encoded, system(engine))
    steps = check(session, model.tokenizer.encode("Once upon"), Settings(8, threshold=2.0))
    assert sum(step.accepted for step in steps) > 0
    prompt = model.tokenizer.encode(REPETITIVE)
    total = dict.fromkeys(COUNTED, 0)
    add_counted(total, session, check(session, prompt, Settings(8, policy=GUESSING), max_tokens=24))
    assert all(total.values())


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 25])
def test_prompts_of_any_length(llama, length):
    """Batches of 8 rows before the last token; then from a cache that another prompt has used."""
    prompt = random_tokens(llama.model.config, length, SEED)
    check(llama, prompt, Settings(8, 2), max_tokens=5)


def test_ends_of_decoding(llama):
    """Token limits, stop tokens anywhere in a step, the end of the context, and nothing to do."""
    model, context = llama.model, llama.model.config.context
    prompt = random_tokens(model.config, 4, SEED)
    settings = Settings(8, 5)
    for limit in (0, 1, 2, 3, 7):
        steps = check(llama, prompt, settings, max_tokens=limit)
        assert sum(len(step.tokens) for step in steps) == limit
    text = [token for step in steps for token in step.tokens]
    for stop in set(text):
        options = {"stop_ids": frozenset({stop}), "max_tokens": 20}
        steps = check(llama, prompt, settings, **options)
        assert steps[-1].tokens[-1] == stop
    # More of them than the accelerator looks for.
    stop = max(text)
    others = set(range(stop)) - set(text)
    assert len(others) > MAX_STOP_TOKENS
    steps = check(llama, prompt, settings, stop_ids=frozenset({stop, *others}), max_tokens=20)
    assert steps[-1].tokens[-1] == stop
    long = random_tokens(model.config, context - 3, SEED)
    steps = check(llama, long, settings, max_tokens=50)
    assert sum(len(step.tokens) for step in steps) == 3


def test_the_weights_in_memory_are_what_counts(llama):
    """A test of these tests: flipped bits of some weights in memory change the logits. Such bits
    leave the weights finite."""
    layout = llama.driver.layout
    prompt = random_tokens(llama.model.config, 9, SEED)
    settings = Settings(8, 0)
    expected = list(generate(llama.model, prompt, None, max_tokens=3, settings=settings))
    weights = layout.weights["block.1.up_proj"]
    for address in (weights.plane, weights.residual, weights.groups):
        content = llama.board.read(address, 16)
        llama.board.write(address, content ^ 0x01)
        try:
            got = list(llama.generate(prompt, max_tokens=3, settings=settings))
        finally:
            llama.board.write(address, content)
        assert (bits(got[0].logits) != bits(expected[0].logits)).any()
    assert_same_steps(list(llama.generate(prompt, max_tokens=3, settings=settings)), expected)


# Results that are not finite.

OVERFLOWING = [f"block.{block}.{layer}" for block in (0, 1) for layer in OVERFLOWS] + ["head"]


@pytest.mark.parametrize("layer", OVERFLOWING)
def test_results_that_are_not_finite_end_decoding(layer):
    """Where the golden model ends, with the same error: in the prompt, at its end, and later."""
    model, prompt = overflowing(drafted_model("llama", SEED), 5, layer), [1, 2, 3, 4, 5, 6, 7]
    texts = (
        (prompt, "prompt", 4),  # the first row of a batch
        (prompt[1:], "prompt", 3),  # the last
        ([5, 6], "prompt", 0),
        (prompt[:5], "verify", 4),
    )
    check_where_it_ends(make_session(model, encode_linears(model), system()), layer, texts)


def test_the_lowest_position_of_a_prompt_is_named():
    """Tokens in one batch and in two; a later one fails in an earlier product."""
    model = overflowing(drafted_model("llama", SEED), 7, "block.0.values")
    model = overflowing(model, 5, "block.1.values", axis=1)
    session = make_session(model, encode_linears(model), system())
    check_lowest_positions(
        session,
        (
            ([1, 2, 5, 7, 3], 2),
            ([1, 2, 3, 5, 7, 7, 4], 3),
            ([7, 5, 3], 0),
            ([1, 2, 3, 4, 9, 5, 7, 3], 5),
        ),
    )


@pytest.mark.parametrize("guesses", [False, True])
def test_steps_whose_drafts_are_not_finite_are_repeated(monkeypatch, guesses):
    """Behind draft and verify passes; decoding ends where the golden model's does."""
    base = drafted_model("llama", SEED, blocks=1)
    policy = replace(GUESSING, limit=65535) if guesses else Policy()
    settings = Settings(4, threshold=0.1, policy=policy)
    prompt = random_tokens(base.config, 4, SEED) * (2 if guesses else 1)
    failed: list[str] = []
    plain_forward = speculation.forward

    def recorded(*arguments, **options):
        try:
            return plain_forward(*arguments, **options)
        except NonFiniteError as error:
            failed.append(error.kind)
            raise

    monkeypatch.setattr(speculation, "forward", recorded)
    wanted = {"a draft", "a verify pass", "the end behind a repetition"}
    for token in range(64):
        model = overflowing(base, token, "block.0.down_proj")
        encoded = encode_linears(model)
        failed.clear()
        steps, end = [], None
        try:
            for step in Session(model, encoded).golden(prompt, max_tokens=6, settings=settings):
                steps.append(step)
        except NonFiniteError as error:
            end = error.step
        repeated = any(step.repeated for step in steps)
        found = {
            "a draft": "draft" in failed,
            "a verify pass": repeated,
            "the end behind a repetition": end is not None and end > 1 and len(failed) > 1,
        }
        found = {name for name, happens in found.items() if happens} & wanted
        if found:
            session = make_session(model, encoded, system())
            got, error = check_end(session, prompt, settings, max_tokens=6)
            assert (len(got), error and error.step) == (len(steps), end)
            assert session.driver.registers["STATUS"] == STATES["IDLE"][0]
            wanted -= found
        if not wanted:
            return
    raise AssertionError(f"no model for {wanted}")


def test_a_run_that_nobody_finishes_is_stopped(llama):
    steps = llama.generate([1, 2, 3], max_tokens=20, settings=Settings(8, 2))
    next(steps)
    steps.close()
    assert llama.driver.registers["STATUS"] == STATES["IDLE"][0]
    check(llama, [1, 2, 3], Settings(8, 2))


@pytest.mark.parametrize("left", ["STEP", "ERROR"])
def test_whatever_an_earlier_driver_left(left):
    """A driver may find the accelerator in the middle of a run, or behind an error."""
    model = drafted_model("llama", SEED)
    encoded = encode_linears(model)
    first = make_session(model, encoded, system())
    steps = first.generate([1, 2, 3], max_tokens=20, settings=Settings(4, 2))
    next(steps)
    if left == "ERROR":
        first.driver.registers.command("stop")
    assert first.driver.registers["STATUS"] == STATES[left][0]
    second = Session(model, encoded, first.board, memory=Region(0, first.driver.layout.size))
    assert second.driver.registers["STATUS"] == STATES["IDLE"][0]
    check(second, [1, 2, 3], Settings(4, 2))


def test_thresholds_are_rounded_up():
    """An FP32 margin is below a number if and only if it is below the FP32 number above it."""
    for value, expected in ((0.0, 0), (2.0, 0x40000000), (math.inf, 0x7F800000), (0.1, 0x3DCCCCCD)):
        assert threshold_bits(value) == expected
    just_above = 2.0 * (1 + 2.0**-40)
    assert threshold_bits(just_above) == 0x40000001
    assert threshold_bits(2.0**-200) == 1 and threshold_bits(1e300) == 0x7F800000


# What the driver refuses.


def refused(
    match: str, model: Model, encoded=None, config: AcceleratorConfig | None = None
) -> None:
    config = config or system()
    with pytest.raises(ValueError, match=match):
        Driver(AcceleratorModel(config, 1 << 22), model, encoded)


def test_encodings_that_the_array_cannot_read_are_refused():
    model = drafted_model("llama", SEED)
    name = "block.1.down_proj"
    part = encode(model.linear_weight(name), FormatConfig(), name=name, drafted_outputs=9)
    refused(f"{name} drafts only part of its outputs", model, {name: part})
    refused(
        "group 32 and split 2.*--group 64 --split 2",
        model,
        encode_linears(model, FormatConfig(32)),
    )


def test_planes_of_other_weights_are_refused():
    """A flipped bit of any array, even one that leaves the tensor's shape and format alone, and the
    encoding of another model."""
    model = drafted_model("llama", SEED)
    for plane in ("draft_plane", "residual_plane", "group_bytes"):
        encoded = encode_linears(model)
        getattr(encoded["block.1.o_proj"], plane)[0, 0, 0] ^= 1
        refused("block.1.o_proj does not decode to the weights of random llama", model, encoded)
    other = encode_linears(drafted_model("llama", SEED + 1))
    refused("block.0.q_proj does not decode to the weights of random llama", model, other)


def test_models_that_do_not_fit_are_refused():
    model = drafted_model("llama", SEED)
    refused(
        "FFN size is 48; the accelerator's largest K is 47",
        model,
        None,
        system(replace(SMALL, max_k=47)),
    )
    refused(
        "vocabulary is 64; the accelerator's largest O is 63",
        model,
        None,
        system(replace(SMALL, max_o=63)),
    )
    biased = replace(model, weights=model.weights | {"head.bias": torch.zeros(64).half()})
    refused("head has a bias", biased)
    board = AcceleratorModel(system(), 1 << 20)
    with pytest.raises(ValueError, match="bytes of memory, not 4096"):
        Driver(board, model, memory=Region(0, 4096))


def test_requests_that_are_impossible_are_refused(llama):
    def attempt(prompt: list[int], max_tokens: int = 4, **settings: object) -> None:
        list(llama.generate(prompt, max_tokens=max_tokens, settings=Settings(**settings)))

    for match, arguments in (
        ("prompt has 0 tokens", {"prompt": []}),
        ("prompt has 48 tokens; expected 1 to 47", {"prompt": [1] * 48}),
        ("rows is 4; this accelerator's array has 8", {"prompt": [1], "rows": 4}),
        ("choices is 9; this accelerator ranks 1 to 8", {"prompt": [1], "choices": 9}),
        (
            "history is 64; this accelerator's has 2048 tokens",
            {"prompt": [1], "history": 64, "policy": GUESSING},
        ),
    ):
        with pytest.raises(ValueError, match=match):
            attempt(**arguments)
    few = make_session(llama.model, None, replace(system(), choices=4))
    for match, settings in (
        ("choices is 5; this accelerator ranks 1 to 4", {"choices": 5}),
        ("reranked is 5; this accelerator ranks 0 \\(none\\) to 4", {"reranked": 5}),
    ):
        with pytest.raises(ValueError, match=match):
            list(few.generate([1], max_tokens=4, settings=Settings(4, **settings)))
    driver = Driver(AcceleratorModel(system(), 1 << 20), llama.model, capacity=20)
    with pytest.raises(ValueError, match="need a KV cache of 21 entries; this one has 20"):
        list(driver.generate([1] * 10, max_tokens=9, settings=Settings(4)))
    assert len(list(driver.generate([1] * 10, max_tokens=8, settings=Settings(4)))) == 8


def test_other_hardware_is_refused():
    class Other(AcceleratorModel):
        def read_register(self, offset: int) -> int:
            return 0xDEAD if offset == 4 else super().read_register(offset)

    with pytest.raises(ValueError, match="VERSION is 0x0000dead"):
        read_configuration(Other(system(), 4096))
    wide = system(EngineConfig(rows=64, cols=64, draft_rows=2), 128, 1024)
    none = replace(system(), history=0)
    for config in (system(), wide, none, replace(system(), choices=4, history=65536)):
        assert read_configuration(AcceleratorModel(config, 4096)) == config
    with pytest.raises(ValueError, match="choices is 3; expected 4 or 8"):
        replace(system(), choices=3)


# Errors of runs.


@pytest.fixture
def bench() -> SimpleNamespace:
    """An accelerator without a model, a sound GEMM, and a function that runs a program."""
    config = system()
    board = AcceleratorModel(config, 1 << 16)
    registers = Registers(board, config)
    for name, value in {
        "READ_LIMIT": 0x7FFF,
        "WRITE_BASE": 0x8000,
        "WRITE_LIMIT": 0xFFFF,
        "PASS_PROGRAM": 0x1000,
        "PROGRAM_LENGTH": 8,
        "PASS_ROWS": 3,
        "POSITION": 5,
        "IRQ_ENABLE": 7,
    }.items():
        registers[name] = value

    def run(*program: Descriptor | bytes) -> tuple[ErrorCode, int]:
        contents = [part if isinstance(part, bytes) else part.pack() for part in program]
        board.write(0x1000, b"".join(contents))
        registers["IRQ_STATUS"] = 7
        registers.command("start")
        assert board.wait_interrupt()
        return ErrorCode(registers["ERROR"]), registers["ERROR_ADDRESS"]

    gemm = Descriptor(
        DescriptorKind.GEMM, k=9, o=10, plane=0x2000, residual=0x3000, groups=0x4000,
        activations=0x5000, results=0x8000,
    )  # fmt: skip
    return SimpleNamespace(config=config, board=board, registers=registers, run=run, gemm=gemm)


END = Descriptor(DescriptorKind.END)
HOST = Descriptor(DescriptorKind.HOST, argument=7)


def idle(registers: Registers) -> bool:
    return registers["STATUS"] == STATES["IDLE"][0]


def altered(descriptor: Descriptor, name: str, value: int) -> bytes:
    """The descriptor in memory with a field of any value."""
    place = DESCRIPTOR[name]
    word = int.from_bytes(descriptor.pack(), "little")
    word &= ~((1 << place.width) - 1 << place.offset)
    return (word | value << place.offset).to_bytes(DESCRIPTOR_BYTES, "little")


def bad_descriptors() -> Iterator[tuple[ErrorCode, str, str, int]]:
    """Code, kind of a sound descriptor, field, and the value that spoils it."""
    for kind in ("gemm", "host"):
        for value in (0, 7, 255):
            yield ErrorCode.UNKNOWN_KIND, kind, "kind", value
    yield ErrorCode.UNKNOWN_KIND, "gemm", "mode", 3
    unused = {
        "gemm": ("discard", "values", "argument", "extra"),
        "argmax": ("half", "values", "sharing", "argument"),
        "scores": ("mode", "discard", "tokens", "argument", "residual", "groups", "o"),
        "values": ("k",),
        "rerank": ("behind", "mode", "half", "wait", "discard", "sharing", "o", "results"),
        "draft": ("residual",),
        "bypass": ("residual", "groups"),
        "host": ("mode", "wait", "tokens", "k", "o", "plane", "results", "extra"),
        "end": ("argument", "half", "groups", "activations"),
    }
    for kind, names in unused.items():
        for name in names:
            yield ErrorCode.RESERVED, kind, name, 1
    sizes = {
        "gemm": {"k": (0, 257, 2**23), "o": (0, 1025, 2**32 - 1), "tokens": (5, 255)},
        "draft": {"tokens": (2,)},
        "scores": {"k": (0, 257), "sharing": (0,)},
        "values": {"o": (0, 1025)},
        "rerank": {"k": (0, 257), "tokens": (0, 9, 255)},
    }
    for kind, fields in sizes.items():
        for name, values in fields.items():
            for value in values:
                yield ErrorCode.BAD_SIZE, kind, name, value
    for name in ("plane", "residual", "groups", "activations", "results"):
        for value in (1, 0x2008, 1 << 40, 1 << 63):
            yield ErrorCode.MISALIGNED, "gemm", name, value
    yield ErrorCode.MISALIGNED, "argmax", "extra", 8
    yield ErrorCode.MISALIGNED, "scores", "extra", 8
    for name in ("plane", "residual", "groups", "activations", "extra"):
        yield ErrorCode.MISALIGNED, "rerank", name, 8


@pytest.mark.parametrize(
    ("code", "kind", "name", "value"),
    list(bad_descriptors()),
    ids=lambda value: getattr(value, "name", None),
)
def test_malformed_descriptors(bench, code, kind, name, value):
    """Each is found behind two sound ones; after STOP the accelerator runs again."""
    attention = {
        "k": 0,
        "o": 0,
        "residual": 0,
        "groups": 0,
        "sharing": 2,
        "kind": DescriptorKind.ATTENTION,
    }
    sound = {
        "gemm": bench.gemm,
        "argmax": replace(bench.gemm, kind=DescriptorKind.ARGMAX),
        "scores": replace(bench.gemm, **attention | {"k": 6}),
        "values": replace(bench.gemm, **attention | {"o": 6, "values": True}),
        "rerank": replace(bench.gemm, kind=DescriptorKind.RERANK, o=0, results=0, candidates=4),
        "draft": replace(bench.gemm, mode=Mode.DRAFT, residual=0, tokens=1),
        "bypass": replace(bench.gemm, mode=Mode.BYPASS, residual=0, groups=0),
        "host": HOST,
        "end": END,
    }
    if kind not in ("host", "end"):
        assert bench.run(sound[kind], END) == (ErrorCode.NONE, 0)
        assert idle(bench.registers)
    spoilt = altered(sound[kind], name, value)
    assert bench.run(bench.gemm, bench.gemm, spoilt, END) == (code, 0x1080)
    assert bench.registers["IRQ_STATUS"] == 4
    bench.registers.command("start")
    assert not idle(bench.registers)
    bench.registers.command("stop")
    assert idle(bench.registers)
    assert bench.run(bench.gemm, END) == (ErrorCode.NONE, 0)


def test_entries_of_the_cache_count_as_a_dimension(bench):
    """Position 5 and 3 rows make 8 entries; with the position at its limit they are 256."""
    product = Descriptor(
        DescriptorKind.ATTENTION, values=True, sharing=1, o=4, plane=0x2000, activations=0x5000,
        results=0x8000,
    )  # fmt: skip
    bench.registers["POSITION"] = 253
    assert bench.run(product, END)[0] == ErrorCode.NONE
    bench.registers["POSITION"] = 254
    assert bench.run(product, END) == (ErrorCode.BAD_REGISTER, 0x088)


def test_programs_without_an_end(bench):
    assert bench.run(*8 * [bench.gemm]) == (ErrorCode.NO_END, 0x1000 + 8 * 64)
    bench.registers.command("stop")
    assert bench.run(*7 * [bench.gemm], END) == (ErrorCode.NONE, 0)


def test_accesses_outside_the_regions(bench):
    """Nothing is written then, not even by the transfers before in the same result."""
    memory = bench.board.read(0, 1 << 16)
    for name, value in (
        ("plane", 0x7FB0),
        ("residual", 0x8000),
        ("groups", 0x10000),
        ("activations", 0x7FF0),
    ):
        outside = replace(bench.gemm, **{name: value})
        code, address = bench.run(outside, END)
        assert code == ErrorCode.READ_OUTSIDE and value <= address < value + 0x200
        bench.registers.command("stop")
    for value in (0x7FF0, 0xFFF0):
        code, address = bench.run(replace(bench.gemm, results=value), END)
        assert code == ErrorCode.WRITE_OUTSIDE and address == value
        bench.registers.command("stop")
    after = bench.board.read(0, 1 << 16)
    memory[0x1000:0x1080] = after[0x1000:0x1080]
    assert np.array_equal(after, memory)
    bench.registers["READ_LIMIT"] = (1 << 30) - 1
    assert bench.run(replace(bench.gemm, plane=1 << 16), END) == (ErrorCode.READ_DECERR, 1 << 16)


def test_the_window_of_the_scratch_memory_is_not_in_memory(bench):
    """What a product writes there a host does not see."""
    address, size = bench.gemm.results, 64
    before = np.full(size, 0x5A, np.uint8)
    bench.board.write(address, before)
    bench.registers["SCRATCH"] = address // 4096 * 4096
    assert bench.run(bench.gemm, END) == (ErrorCode.NONE, 0)
    assert np.array_equal(bench.board.read(address, size), before)
    bench.registers["SCRATCH"] = 0
    assert bench.run(bench.gemm, END) == (ErrorCode.NONE, 0)
    assert not np.array_equal(bench.board.read(address, size), before)


def test_impossible_registers(bench):
    registers = bench.registers
    sound = {"CHOICES": 1, "TOKEN_LIMIT": 1, "RING_LOG2": 1, "DRAFT_PROGRAM": 64, "RING": 0x9000}
    for name, value in sound.items():
        registers[name] = value
    for decode, name, value, offset in (
        (0, "PASS_ROWS", 0, 0x084),
        (0, "PASS_ROWS", 5, 0x084),
        (0, "PASS_PROGRAM", 0x1020, 0x060),
        (0, "READ_LIMIT", 1 << 40, 0x048),
        (1, "DRAFT_PROGRAM", 0x20, 0x068),
        (1, "DRAFT_LENGTH", 4, 0x090),
        (1, "CHOICES", 0, 0x098),
        (1, "CHOICES", 9, 0x098),
        (1, "TOKEN_LIMIT", 0, 0x09C),
        (1, "RING", 0x9004, 0x0A0),
        (1, "RING_LOG2", 0, 0x0A8),
        (1, "RING_LOG2", 25, 0x0A8),
        (1, "HISTORY_LENGTH", 2049, 0x0C8),
        (1, "POSITION", 253, 0x088),
        (0, "SCRATCH", 0x1040, 0x358),
    ):
        kept = registers[name]
        registers["RUN"], registers[name] = decode, value
        assert bench.run(END) == (ErrorCode.BAD_REGISTER, offset), name
        registers.command("stop")
        registers[name] = kept
    registers["RUN"] = 0
    assert bench.run(END) == (ErrorCode.NONE, 0)


def test_answers_of_the_host(bench):
    registers = bench.registers
    for answer, outcome in (
        ("CONTINUE", (ErrorCode.NONE, 0)),
        ("FAIL", (ErrorCode.HOST_REFUSED, 0x1000)),
        ("FINISH", (ErrorCode.HOST_REFUSED, 0x1000)),
    ):
        assert bench.run(HOST, END) == (ErrorCode.NONE, 0)
        assert registers["STATUS"] == STATES["HOST"][0] and registers["HOST_ARGUMENT"] == 7
        assert registers["IRQ_STATUS"] == 1
        registers["HOST_ANSWER"] = ANSWERS[answer][0]
        assert (ErrorCode(registers["ERROR"]), registers["ERROR_ADDRESS"]) == outcome
        assert registers["IRQ_STATUS"] == (2 if answer == "CONTINUE" else 4)
        registers.command("stop")
    bench.run(HOST, END)
    registers.command("stop")
    assert ErrorCode(registers["ERROR"]) == ErrorCode.STOPPED


def test_errors_reach_the_caller_and_the_accelerator_goes_on(llama):
    """A descriptor is spoilt and repaired."""
    place = llama.driver.layout.programs[PassKind.VERIFY] + 2 * DESCRIPTOR_BYTES
    board = llama.board
    content = board.read(place, 1)
    board.write(place, np.array([99], np.uint8))
    with pytest.raises(AcceleratorError, match=f"UNKNOWN_KIND at {place:#x}") as caught:
        list(llama.generate([1, 2], max_tokens=4, settings=Settings(8)))
    assert (caught.value.code, caught.value.address) == (ErrorCode.UNKNOWN_KIND, place)
    board.write(place, content)
    check(llama, [1, 2], Settings(8))
