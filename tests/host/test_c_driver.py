# SPDX-License-Identifier: Apache-2.0
"""The C driver on the functional model of an accelerator: the golden model's
tokens, and what it refuses before anything is written."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speq.host.accelerator_model import AcceleratorModel
from speq.host.image import model_image
from speq.host.image_file import write_image
from speq.host.layout import Kind
from speq.host.registers import Registers
from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.control.register_map import STATES, registers
from speq.hw.verilog.register_docs import c_header
from speq.model.encoding import encode_linears
from speq.model.settings import Sampling, Settings
from speq.model.transformer import NonFiniteError
from tests.host.c_driver import HEADER, RESULTS, SOURCES, STRICT, CDriver, compile_driver
from tests.host.decoding import GUESSING, SEED, system
from tests.host.test_image import Written, resealed
from tests.model.drafted import drafted_model, randomly_scaled
from tests.model.small_models import overflowing, random_tokens

CONFIG = replace(system(), lanes=4, query_heads=8)
ROWS = CONFIG.engine.rows
ALIGNMENT = CONFIG.load_alignment
SETTINGS = Settings(ROWS, 2, 0.1, 3, 2, GUESSING)
MOST_LINES = 500


def made_of(model, encoded, folder: Path, config=CONFIG, settings=SETTINGS, **options):
    """An image of a model, its file's content and the golden model."""
    image = model_image(config, model, encoded, settings=settings, **options)
    write_image(folder / "model.image", image)
    content = (folder / "model.image").read_bytes()
    return SimpleNamespace(
        model=model,
        image=image,
        content=content,
        config=config,
        golden=Session(model, encoded),
        texts={},
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_driver(CONFIG, tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model with biases and heads that are no whole tiles; settings for rows of all kinds."""
    model = drafted_model("qwen2", SEED, head_dim=10, context=60)
    encoded = randomly_scaled(model, np.random.default_rng(SEED), drafted_outputs=50)
    return made_of(model, encoded, tmp_path_factory.mktemp("qwen"))


def loaded(library: ctypes.CDLL, made: SimpleNamespace, base: int = 0, **options) -> CDriver:
    """The driver on a board whose memory has noise behind the load address and ends with it."""
    board = Written(made.config, made.image.size, base)
    board.write(base, np.random.default_rng(SEED).integers(0, 256, made.image.size, np.uint8))
    driver = CDriver(library, board, made.content, **options)
    assert driver.load(base, made.image.size) == "OK"
    driver.board = board
    return driver


def golden(made: SimpleNamespace, prompt: list[int], **options: object) -> list[int]:
    """The golden model's tokens, without drafts: speculation changes nothing."""
    options = {"max_tokens": 10, "settings": Settings(ROWS, 0)} | options
    key = (*prompt, *(item for item in options.items() if item[0] != "generator"))
    if key not in made.texts or "generator" in options:
        steps = made.golden.golden(prompt, **options)
        made.texts[key] = [token for step in steps for token in step.tokens]
    return made.texts[key]


def count(driver: CDriver, name: str) -> int:
    return Registers(driver.board, CONFIG)[name]


# Sources.


def test_the_driver_is_short() -> None:
    lines = sum(
        len((SOURCES / name).read_text().splitlines()) for name in ("speq_driver.c", HEADER)
    )
    assert lines <= MOST_LINES


@pytest.mark.parametrize("history", [0, 2048])
def test_sources_compile_without_warnings(tmp_path, history) -> None:
    (tmp_path / "speq_top.h").write_text(c_header(replace(CONFIG, history=history)))
    options = [*STRICT, f"-I{SOURCES}", f"-I{tmp_path}"]
    sources = [SOURCES / "speq_driver.c", SOURCES / "main.c"]
    subprocess.run(
        ["gcc", "-std=c99", "-O2", *options, *sources, "-o", tmp_path / "main"], check=True
    )
    header = ["g++", "-std=c++17", *STRICT, "-fsyntax-only", "-xc++", HEADER]
    subprocess.run(header, check=True)


def started(folder: Path, made: SimpleNamespace, *arguments: object):
    """Run main.c with files in the place of registers, whose state is IDLE, and of memory."""
    window = np.zeros(4096, np.uint8)
    board = AcceleratorModel(made.config, 64)
    for register in registers(made.config):
        for offset in register.offsets:
            window[offset : offset + 4] = np.array([board.read_register(offset)], "<u4").view("u1")
    known = {register.name: register.offset for register in registers(made.config)}
    window[known["RING_INDEX"]] = 3
    memory = np.zeros(made.image.size + 4096, np.uint8)
    ring = next(part.start for part in made.image.parts if part.kind is Kind.RING)
    memory[4096 + ring :][:12].view("<u4")[:] = [7, 1 << 20, 9]
    (folder / "control").write_bytes(window)
    (folder / "memory").write_bytes(memory)
    (folder / "model.image").write_bytes(made.content)
    command = [folder / "main", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    window = np.fromfile(folder / "control", np.uint8)
    words = {name: int(window[offset:][:4].view("<u4")[0]) for name, offset in known.items()}
    return result, words, np.fromfile(folder / "memory", np.uint8)[4096:]


def test_the_example_for_linux(qwen, tmp_path) -> None:
    """It loads the image, writes the registers of a run and prints what is in the ring."""
    (tmp_path / "speq_top.h").write_text(c_header(CONFIG))
    sources = [SOURCES / "speq_driver.c", SOURCES / "main.c"]
    command = ["gcc", "-std=c99", *STRICT, f"-I{tmp_path}", *sources, "-o", tmp_path / "main"]
    subprocess.run(command, check=True)
    places = ("control", "memory@4096", "0x10000", qwen.image.size, "model.image")
    arguments = [str(argument) for argument in (*places, 5, 6, 8)]
    options = ("-n", "3", "-s", "11", "-s", "12", "-t", "0.5", "-r", str((1 << 63) + 9))
    made, words, memory = started(tmp_path, qwen, *options, *arguments)
    assert (made.returncode, made.stdout, made.stderr) == (0, "7\n1048576\n9\n", "")
    expected = {"ROOT": 8, "PROMPT_END": 2, "POSITION": 0, "TOKEN_LIMIT": 3, "STOP_TOKENS": 2}
    assert {name: words[name] for name in expected} == expected
    assert words["STOP_TOKEN"] == 11 and words["SEED"] == 9 and words["RUN"] == 1 | 2 | 16
    assert np.uint32(words["SCALE"]).view(np.float32) == 2.0
    board = AcceleratorModel(CONFIG, qwen.image.size, 0x10000)
    qwen.image.load(board, 0x10000)
    for part in qwen.image.parts:
        if part.kind.is_given:
            piece = board.read(0x10000 + part.start, part.size)
            assert np.array_equal(memory[part.start :][: part.size], piece), part
        elif part.kind is Kind.TEXT:
            assert memory[part.start :][:12].view("<u4").tolist() == [5, 6, 8]
    for changed, message in (
        ([*arguments[:2], "0x10001", *arguments[3:]], "the load address is not aligned"),
        ([*arguments[:3], "4096", *arguments[4:]], "the memory is too small"),
        ([*arguments[:4], "control", "1"], "the file is no image"),
        ([*arguments[:4], "missing", "1"], "the image cannot be read"),
        (["missing", *arguments[1:]], "missing: cannot be opened"),
        ([*arguments, "1x"], "1x: expected a number"),
        ([*arguments, "64"], "a token that the model has not"),
        (arguments[:5], "usage: CONTROL"),
    ):
        made, _, _ = started(tmp_path, qwen, *changed)
        assert made.returncode == 1 and made.stdout == ""
        assert message in made.stderr and made.stderr.count("\n") == 1


def test_it_is_for_accelerators_with_a_vector_unit(tmp_path) -> None:
    (tmp_path / "speq_top.h").write_text(c_header(AcceleratorConfig(lanes=0)))
    command = ["gcc", "-fsyntax-only", f"-I{tmp_path}", SOURCES / "speq_driver.c"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode
    assert "this driver is for accelerators with a vector unit" in made.stderr


def test_messages_and_names(library) -> None:
    """A line for each result, and a name for each error, and for those that there are not."""
    messages = [library.speq_message(i).decode() for i in range(len(RESULTS))]
    assert len(set(messages)) == len(RESULTS) > 10
    assert not any("\n" in message for message in messages)
    for i in (-1, len(RESULTS)):
        assert library.speq_message(i) == b"unknown result"
    for code in ErrorCode:
        assert library.speq_error_name(code.value).decode() == code.name
    assert library.speq_error_name(len(ErrorCode)) == b"unknown error"


# Decoding.


@pytest.mark.parametrize("beats", [0, (1 << 40) // 64 - 32768])
def test_greedy_tokens_are_the_golden_models(library, qwen, beats) -> None:
    """Behind load addresses of up to 40 bits; prompts of one token, of some passes, and up to the
    end of the context; with drafts, alternates and guesses, and without."""
    driver = loaded(library, qwen, beats * CONFIG.alignment, waits=bool(beats))
    for length in (1, 2, 3 * ROWS):
        prompt = (random_tokens(qwen.model.config, length, SEED) * 2)[: max(1, 2 * length - 1)]
        expected = golden(qwen, prompt, max_tokens=12)
        for plain in (0, 1) if beats else (0,):
            drafted = count(driver, "DRAFT_PASSES")
            assert driver.generate(prompt, max_tokens=12, plain=plain) == ("OK", expected)
            assert (count(driver, "DRAFT_PASSES") > drafted) == (not plain)
            assert driver.state.known == len(prompt) + len(expected) - 1
    assert count(driver, "ALTERNATES") and count(driver, "GUESSES")
    if not beats:
        return
    context = qwen.model.config.context
    prompt = random_tokens(qwen.model.config, context - 5, SEED)
    expected = golden(qwen, prompt)
    assert len(expected) == 5
    assert driver.generate(prompt) == ("OK", expected)


def test_accepted_alternates_and_guesses_are_moved(library, qwen) -> None:
    """Behind which further steps attend to them."""
    driver = loaded(library, qwen)
    hits = 0
    for seed in range(6):
        prompt = random_tokens(qwen.model.config, 3, SEED + seed) * 3
        expected = golden(qwen, prompt, max_tokens=16)
        assert driver.generate(prompt, max_tokens=16) == ("OK", expected), f"SPEQ_SEED={SEED}"
        hits = count(driver, "ALTERNATE_HITS") + count(driver, "GUESS_HITS")
        if hits >= 4:
            break
    assert hits


def test_tokens_that_the_ring_has_no_room_for(library, qwen) -> None:
    """A text is decoded in several runs."""
    driver = loaded(library, qwen)
    driver.state.ring_tokens = 4
    Registers(driver.board, CONFIG)["RING_LOG2"] = 2
    assert driver.generate([1, 2, 3], max_tokens=30) == (
        "OK",
        golden(qwen, [1, 2, 3], max_tokens=30),
    )


def test_nothing_follows_a_stop_token(library, qwen) -> None:
    driver = loaded(library, qwen)
    prompt = random_tokens(qwen.model.config, 6, SEED)
    text = golden(qwen, prompt, max_tokens=12)
    other = next(token for token in range(64) if token not in text)
    for stops in ([text[0]], [other, text[7]], [text[3]] * 8, [other]):
        expected = golden(qwen, prompt, max_tokens=12, stop_ids=frozenset(stops))
        assert driver.generate(prompt, max_tokens=12, stops=stops) == ("OK", expected)
        assert driver.state.known == len(prompt) + len(expected) - 1
    # Those of a run before do not count.
    assert driver.generate(prompt, max_tokens=12) == ("OK", text)
    assert driver.generate(prompt, stops=[other] * 9) == ("BAD_SETTING", [])


@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_sampled_tokens_are_the_golden_models(library, qwen, min_p) -> None:
    driver = loaded(library, qwen)
    prompt = random_tokens(qwen.model.config, 5, SEED)
    texts = []
    for seed in (1, (1 << 64) - 3):
        sampling = Sampling(0.9, min_p=min_p)
        generator = torch.Generator().manual_seed(seed)
        expected = golden(qwen, prompt, sampling=sampling, generator=generator)
        options = {"truncate": min_p > 0, "cutoff": sampling.cutoff if min_p else 0}
        for plain in (0, 1):
            got = driver.generate(
                prompt, plain=plain, sample=1, temperature=0.9, seed=seed, **options
            )
            assert got == ("OK", expected)
        texts.append(expected)
    assert (texts[0] != texts[1]) == (min_p < 1)
    assert driver.generate(prompt) == ("OK", golden(qwen, prompt))
    for temperature in (0.0, -1.0, float("nan")):
        assert driver.generate(prompt, sample=1, temperature=temperature) == ("BAD_SETTING", [])


def test_conversations_take_up_the_cache(library, qwen) -> None:
    """Only what is new is written and computed; a text can be ended by the caller and go on."""
    driver = loaded(library, qwen)
    prompt = random_tokens(qwen.model.config, 9, SEED)
    result, reply = driver.generate(prompt, max_tokens=8)
    assert result == "OK"
    text = [*prompt, *reply]
    prompt = [*text, *random_tokens(qwen.model.config, 3, SEED + 1)]
    for resume in (len(text), len(prompt), 1 << 31):  # more than is known makes no difference
        driver.state.known = len(text) - 1
        written = driver.calls["write_memory"]
        expected = golden(qwen, prompt)
        assert driver.generate(prompt, resume=resume) == ("OK", expected)
        assert driver.calls["write_memory"] - written == len(prompt) - (len(text) - 1)
    assert driver.generate(prompt, resume=len(prompt)) == ("OK", expected)
    # Another text from token 7 on.
    prompt[7] = (prompt[7] + 1) % 64
    assert driver.generate(prompt, resume=7) == ("OK", golden(qwen, prompt))
    # A run that is ended, whatever it has committed by then.
    result, taken = driver.generate(prompt, max_tokens=20, cancel=3)
    assert (result, taken) == ("CANCELLED", golden(qwen, prompt)[:3])
    assert count(driver, "STATUS") == STATES["IDLE"][0]
    prompt = [*prompt, *taken, 5, 6]
    assert driver.generate(prompt, resume=len(prompt) - 2) == ("OK", golden(qwen, prompt))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_other_models(library, tmp_path, architecture) -> None:
    """With sliding windows; partly encoded, and without drafts."""
    model = drafted_model(architecture, SEED)
    encoded = encode_linears(model)
    del encoded["block.0.k_proj"]
    for chosen, settings in ((encoded, None), ({}, None)):
        made = made_of(model, chosen, tmp_path, settings=settings)
        driver = loaded(library, made)
        prompt = random_tokens(model.config, 11, SEED)
        assert driver.generate(prompt) == ("OK", golden(made, prompt))
        assert (count(driver, "DRAFT_PASSES") > 0) == bool(chosen)


def test_an_accelerator_without_a_history(tmp_path) -> None:
    config = replace(CONFIG, history=0)
    library = compile_driver(config, tmp_path)
    model = drafted_model("llama", SEED)
    made = made_of(model, encode_linears(model), tmp_path, config, settings=None)
    driver = loaded(library, made)
    assert driver.generate([1, 2, 3]) == ("OK", golden(made, [1, 2, 3]))


def test_steps_whose_drafts_are_not_finite_are_repeated(library, tmp_path) -> None:
    """Decoding ends where the golden model's does, with its tokens, and with NONFINITE. Whether
    something is repeated depends on the model, so this one is always the same."""
    base = drafted_model("llama", 0, blocks=1)
    prompt = random_tokens(base.config, 4, 0)
    repeated, ended = [], []
    for token in (17, 20, 22, 23, 28, 58):
        model = overflowing(base, token, "block.0.down_proj")
        settings = Settings(ROWS, 3, 0.1)
        made = made_of(model, encode_linears(model), tmp_path, settings=settings)
        expected: list[int] = []
        result = "OK"
        try:
            for step in made.golden.golden(prompt, max_tokens=8, settings=settings):
                expected += step.tokens
                repeated += [token] * step.repeated
        except NonFiniteError:
            result = "RUN_FAILED"
            ended.append(token)
        driver = loaded(library, made)
        assert driver.generate(prompt, max_tokens=8) == (result, expected)
        assert result == "OK" or (driver.error == "NONFINITE" and driver.state.error_address)
        assert count(driver, "STATUS") == STATES["IDLE"][0]
    assert set(ended) == {17, 20, 22, 58} and set(repeated) == {20, 23, 28}


# What is refused.


def test_prompts_that_are_impossible_are_refused(library, qwen, tmp_path) -> None:
    driver = loaded(library, qwen)
    written = len(driver.board.written)
    assert CDriver(library, driver.board, b"").generate([1]) == ("NOT_LOADED", [])
    context = qwen.model.config.context
    for prompt in ([], [64], [1, 1 << 31], [1] * context, [1] * (context + 1)):
        assert driver.generate(prompt) == ("BAD_PROMPT", [])
    assert driver.generate([1], max_tokens=0) == ("BAD_SETTING", [])
    assert len(driver.board.written) == written
    # A KV cache that is shorter than the context.
    model = drafted_model("llama", SEED)
    made = made_of(model, encode_linears(model), tmp_path, settings=None, capacity=20)
    driver = loaded(library, made)
    most = 20 - ROWS + 2
    for length in (most - 1, most - 3):
        prompt = random_tokens(model.config, length, SEED)
        assert driver.generate(prompt) == ("OK", golden(made, prompt, max_tokens=most - length))
    assert driver.generate([1] * most) == ("BAD_PROMPT", [])


def refused(library, made: SimpleNamespace, content: bytes, config=CONFIG, base=0, size=1 << 40):
    """The result of loading a file; nothing has been written."""
    board = Written(config, made.image.size + 4096)
    result = CDriver(library, board, content).load(base, size)
    assert board.written == []
    return result


def test_damaged_images_are_refused(library, qwen) -> None:
    """A flipped bit of anything but the magic, in all parts of the file; truncated and longer
    files, and others."""
    content = qwen.content
    (header_bytes,) = struct.unpack_from("<I", content, 40)
    places = [*range(12, 176, 4), *range(176, header_bytes, 193), header_bytes, len(content) - 1]
    places += np.random.default_rng(SEED).integers(header_bytes, len(content), 10).tolist()
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 4
        assert refused(library, qwen, bytes(changed)) == "DAMAGED", place
    for length in (0, 9, 175, 176, 300, header_bytes - 1, header_bytes, len(content) - 8):
        assert refused(library, qwen, content[:length]) == "DAMAGED", length
    assert refused(library, qwen, content + b"\0") == "DAMAGED"
    for place in (0, 7, 8, 11):
        changed = bytearray(content)
        changed[place] ^= 4
        assert refused(library, qwen, bytes(changed)) == "NO_IMAGE"
    assert refused(library, qwen, bytes(1000)) == "NO_IMAGE"


def test_forged_tables_are_refused(library, qwen) -> None:
    """Sizes and places beyond the memory or the file, with a checksum that is right."""
    regions, settings, _ = struct.unpack_from("<3I", qwen.content, 44)
    registers = 176 + 64 * regions
    relocations = registers + 16 * settings
    last = relocations - 16
    for place, form, value in (
        (24, "<Q", 0),  # memory_bytes
        (24, "<Q", 4096),
        (56, "<I", 0),  # alignment
        (56, "<I", 3),
        (44, "<I", regions - 1),
        (176 + 8, "<Q", 1 << 63),  # offset
        (176 + 8, "<Q", 4),
        (176 + 16, "<Q", (1 << 64) - 8),  # size
        (176 + 24, "<Q", (1 << 64) - 64),  # position
        (last, "<I", 1 << 12),  # register
        (last, "<I", 2),
        (last + 4, "<I", 3),  # action
        (relocations, "<Q", 1 << 40),
        (relocations, "<Q", 4),
    ):
        content = bytearray(qwen.content)
        struct.pack_into(form, content, place, value)
        resealed(content)
        assert refused(library, qwen, bytes(content)) == "DAMAGED", (place, value)


def test_images_for_other_accelerators_are_refused(library, qwen) -> None:
    for other in (
        replace(CONFIG, lanes=8),
        replace(CONFIG, history=64),
        replace(CONFIG, scratch=4096),
        replace(CONFIG, query_heads=16),
        replace(CONFIG, engine=replace(CONFIG.engine, rows=8)),
    ):
        assert refused(library, qwen, qwen.content, other) == "OTHER_BOARD"


def test_addresses_and_memory_are_compared(library, qwen) -> None:
    size = qwen.image.size
    for base in (8, ALIGNMENT // 2, 1 << 40, (1 << 40) - ALIGNMENT, (1 << 64) - 64):
        assert refused(library, qwen, qwen.content, base=base, size=1 << 63) == "BAD_ADDRESS"
    assert refused(library, qwen, qwen.content, size=size - 1) == "NO_ROOM"
    assert refused(library, qwen, qwen.content, base=1 << 20, size=0) == "NO_ROOM"


@pytest.mark.parametrize("name", ["read_register", "write_register", "read_memory", "write_memory"])
def test_boards_that_fail(library, qwen, name) -> None:
    """At any call, when loading and when decoding; afterwards the driver can start anew."""
    board = AcceleratorModel(CONFIG, qwen.image.size + 4096)
    driver = CDriver(library, board, qwen.content)
    base = ALIGNMENT  # so that there is something to relocate
    assert driver.load(base) == "OK"
    calls = driver.calls[name]
    for left in (0, 1, calls // 2, calls - 1):
        driver.failing[name] = left
        assert driver.load(base) == "BOARD_FAILED", left
    driver.failing.clear()
    assert driver.load(base) == "OK"
    before = driver.calls[name]
    assert driver.generate([1, 2, 3]) == ("OK", golden(qwen, [1, 2, 3]))
    calls = driver.calls[name] - before
    for left in (0, 1, calls // 2, calls - 1):
        driver.failing[name] = left
        result, tokens = driver.generate([1, 2, 3])
        assert result == "BOARD_FAILED", left
        assert tokens == golden(qwen, [1, 2, 3])[: len(tokens)]
        assert driver.state.known == 0 or left == calls - 1
    driver.failing.clear()
    assert driver.generate([1, 2, 3], resume=3) == ("OK", golden(qwen, [1, 2, 3]))


def test_files_that_cannot_be_read(library, qwen) -> None:
    board = Written(CONFIG, qwen.image.size)
    driver = CDriver(library, board, qwen.content)
    for left in (0, 1, 5, 20):
        driver.failing["read"] = left
        assert driver.load() == "FILE_FAILED"
        assert board.written == []
    driver.failing.clear()
    driver.failing["wait"] = 0
    assert driver.load() == "OK"
    assert driver.generate([1, 2, 3]) == ("BOARD_FAILED", [])


def test_a_file_that_changes_while_it_is_loaded(library, qwen) -> None:
    """Between the comparison and the copy."""
    board = Written(CONFIG, qwen.image.size)
    driver = CDriver(library, board, qwen.content)

    def changing(address: int, values: np.ndarray) -> None:
        Written.write(board, address, values)
        driver.image = qwen.content[:-1] + bytes([qwen.content[-1] ^ 1])

    board.write = changing
    assert driver.load() == "DAMAGED"


def test_errors_of_runs_have_their_names(library, qwen, tmp_path) -> None:
    """A run that cannot work says why; the accelerator is idle again, and the next run works."""
    driver = loaded(library, qwen)
    registers = Registers(driver.board, CONFIG)
    limit = registers["READ_LIMIT"]
    for name, value, error in (("READ_LIMIT", 0, "READ_OUTSIDE"), ("CHOICES", 0, "BAD_REGISTER")):
        kept = registers[name]
        registers[name] = value
        assert driver.generate([1, 2, 3]) == ("RUN_FAILED", [])
        assert driver.error == error
        assert registers["STATUS"] == STATES["IDLE"][0]
        registers[name] = kept
    assert registers["READ_LIMIT"] == limit
    assert driver.generate([1, 2, 3]) == ("OK", golden(qwen, [1, 2, 3]))


class Hanging(Written):
    """A board whose STATUS has a value of its own, from now on or from the next start on."""

    state: int | None = None
    started: int | None = None

    def _name(self, offset: int) -> str:
        return self._places[offset][0].name

    def read_register(self, offset: int) -> int:
        if self._name(offset) == "STATUS" and self.state is not None:
            return self.state
        return super().read_register(offset)

    def write_register(self, offset: int, value: int) -> None:
        super().write_register(offset, value)
        if (self._name(offset), value) == ("CONTROL", 1):
            self.state = self.started
        elif self._name(offset) == "CONTROL" and self.state == self.started:
            self.state = None  # STOP


def test_accelerators_that_hang(library, qwen) -> None:
    board = Hanging(CONFIG, qwen.image.size)
    driver = CDriver(library, board, qwen.content, waits=False)
    board.state = STATES["RUNNING"][0]
    assert driver.load() == "HANGS"
    assert len(board.written) == 1  # STOP
    board.state = None
    assert driver.load() == "OK"
    tokens = driver.generate([1, 2, 3])[1]

    board.started = STATES["HOST"][0]
    assert driver.generate([1, 2, 3]) == ("UNEXPECTED", tokens)
