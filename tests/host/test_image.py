# SPDX-License-Identifier: Apache-2.0
"""Images on the accelerator's functional model: what is loaded, and what is refused before.

`documented` reads a file by docs/image.md alone, with no code of the project.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from speq.host.accelerator_model import AcceleratorModel
from speq.host.board import Board
from speq.host.image import Action, Image, model_image
from speq.host.image_file import describe, read_image, write_image
from speq.host.layout import Kind, Region
from speq.host.registers import Registers
from speq.host.session import Session, memory_size
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.descriptor import DESCRIPTOR_BYTES, DescriptorKind
from speq.hw.control.register_map import registers
from speq.hw.engine_config import EngineConfig
from speq.model.checkpoint import Model
from speq.model.encoding import encode_linears
from speq.model.number_format import FormatConfig
from speq.model.settings import Settings
from tests.host.decoding import GUESSING, SEED, SMALL, assert_same_steps, check, system
from tests.model.drafted import drafted_model, randomly_scaled
from tests.model.small_models import random_tokens

#: Three accelerators: 4 x 8, 8 x 16 with narrow ports, groups of 32 and no history, and one with
#: fewer lanes and query heads.
CONFIGS = {
    "4x8": system(),
    "8x16": replace(
        system(EngineConfig(rows=8, cols=16, format=FormatConfig(32, 1), max_k=256), weights=64),
        history=0,
    ),
    "4 lanes": replace(system(), lanes=4, query_heads=8),
}
#: Kinds of regions with weights.
WEIGHTS = (Kind.PLAIN_WEIGHTS, Kind.DRAFT_PLANE, Kind.RESIDUAL_PLANE, Kind.GROUP_BYTES)
#: Settings of the first, all different from the defaults.
SETTINGS = Settings(4, 2, 0.1, 3, 2, GUESSING)


class Written(AcceleratorModel):
    """A board that notes what is written to it."""

    def __init__(self, config: AcceleratorConfig, size: int, base: int = 0) -> None:
        self.written: list[int] = []
        super().__init__(config, size, base)

    def write(self, address: int, values: np.ndarray | bytes | bytearray | memoryview) -> None:
        self.written.append(address)
        super().write(address, values)

    def write_register(self, offset: int, value: int) -> None:
        self.written.append(offset)
        super().write_register(offset, value)


def model_of(name: str) -> tuple[Model, dict]:
    """A model for a configuration, and its encoding: of the first with scale codes of its own and a
    head that drafts in part, of the others without some layers."""
    config = CONFIGS[name]
    if name == "4 lanes":
        model = drafted_model("qwen2", SEED, head_dim=10)
        encoded = encode_linears(model)
        del encoded["block.0.k_proj"]
        return model, encoded
    if name == "4x8":
        model = drafted_model("llama", SEED)
        return model, randomly_scaled(model, np.random.default_rng(SEED), drafted_outputs=30)
    model = drafted_model("gemma3", SEED, hidden=44, vocab_size=61)
    encoded = encode_linears(model, config.engine.format)
    for layer in ("block.0.k_proj", "block.1.down_proj", "head"):
        del encoded[layer]
    return model, encoded


def written(path: Path, name: str) -> SimpleNamespace:
    model, encoded = model_of(name)
    settings = SETTINGS if name == "4x8" else None
    write_image(path, model_image(CONFIGS[name], model, encoded, settings=settings))
    return SimpleNamespace(path=path, model=model, encoded=encoded, config=CONFIGS[name])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """An image file for each configuration, with what it was made of."""
    folder = tmp_path_factory.mktemp("images")
    return {name: written(folder / f"{name}.image", name) for name in CONFIGS}


def board_with_noise(made: SimpleNamespace, base: int) -> Written:
    """A board whose memory begins at the load address, ends with the model and is full of noise."""
    size = memory_size(made.config, made.model, made.encoded, read_image(made.path).capacity, base)
    board = Written(made.config, size, base)
    board.write(base, np.random.default_rng(SEED).integers(0, 256, size, np.uint8))
    board.written.clear()
    return board


# What is loaded.


@pytest.mark.parametrize("beats", [0, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_from_a_file_is_the_golden_models(images, name, beats):
    """Behind any load address, with the file's settings and with others."""
    made = images[name]
    base = beats * made.config.load_alignment
    board, image = board_with_noise(made, base), read_image(made.path)
    memory = Region(base, base + image.size)
    session = Session(made.model, board=board, memory=memory, image=image)
    assert set(session.encoded) == set(made.encoded)
    prompt = random_tokens(made.model.config, 6, SEED) * 2
    steps = check(session, prompt, image.settings)
    expected = Session(made.model, made.encoded).golden(
        prompt, max_tokens=10, settings=image.settings
    )
    assert_same_steps(steps, list(expected))
    check(session, prompt, Settings(made.config.engine.rows, reranked=4), max_tokens=4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_holds_what_it_was_made_of(images, name):
    made = images[name]
    rows = made.config.engine.rows
    settings = SETTINGS if name == "4x8" else Settings(rows, rows - 1)
    again = read_image(made.path)
    direct = model_image(made.config, made.model, made.encoded, settings=settings)
    for member in ("name", "digest", "capacity", "size", "parts", "registers", "relocations"):
        assert getattr(again, member) == getattr(direct, member), member
    assert again.config == made.config
    assert again.digest == made.model.digest
    assert replace(again.settings, threshold=0, history=2048) == replace(
        settings, threshold=0, choices=settings.offered
    )
    assert again.settings.threshold == np.float32(settings.threshold)
    for part in again.parts:
        if part.kind.is_given:
            assert again.content(part).tobytes() == direct.content(part).tobytes(), part
    for layer, tensor in again.encoded(made.model).items():
        weight = made.model.linear_weight(layer)
        assert (tensor.decode().view(dtype=weight.dtype) == weight).all()
        assert tensor.drafted_outputs == made.encoded[layer].drafted_outputs


def documented(content: bytes, base: int) -> tuple[list, list, list]:
    """What docs/image.md says that a loader does with a file: registers to compare and to write,
    and pieces of memory, all behind a load address."""
    (magic, version, checksum, file_bytes, memory_bytes, _, header_bytes) = struct.unpack_from(
        "<8sIIQQQI", content
    )
    regions, settings, relocations, alignment = struct.unpack_from("<4I", content, 44)
    assert (magic, version, file_bytes) == (b"SPEQIMG\0", 1, len(content))
    assert zlib.crc32(content[16:header_bytes]) == checksum
    assert base % alignment == 0
    memory, expected, given = bytearray(memory_bytes), [], []
    pieces = []
    at = 176
    for _ in range(regions):
        kind, region_checksum, offset, size, position = struct.unpack_from("<IIQQQ", content, at)
        at += 64
        if position:
            piece = content[position : position + size]
            assert zlib.crc32(piece) == region_checksum
            memory[offset : offset + size] = piece
            pieces.append((kind, offset, size))
    for _ in range(settings):
        register, action, value = struct.unpack_from("<IIQ", content, at)
        at += 16
        if action == 0:
            expected.append((register, value))
        elif action == 1:
            given.append((register, value))
        else:
            value += base
            given += [(register, value & 0xFFFFFFFF), (register + 4, value >> 32)]
    for _ in range(relocations):
        (offset,) = struct.unpack_from("<Q", content, at)
        at += 8
        (word,) = struct.unpack_from("<Q", memory, offset)
        struct.pack_into("<Q", memory, offset, word + base)
    assert at == header_bytes
    return expected, given, [(base + o, bytes(memory[o : o + s])) for _, o, s in pieces]


@pytest.mark.parametrize("beats", [0, 5 << 8, (1 << 40) // 64 - 65536])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_reader_by_the_documentation_loads_what_the_driver_loads(images, name, beats):
    """Addresses of 40 bits included. What is not a region's is left alone, and the accelerator
    finds its registers as the driver leaves them."""
    made = images[name]
    base = beats * 64
    driven, by_hand = board_with_noise(made, base), board_with_noise(made, base)
    image = read_image(made.path)
    Session(made.model, board=driven, memory=Region(base, base + image.size), image=image)
    expected, settings, pieces = documented(made.path.read_bytes(), base)
    for register, value in expected:
        assert by_hand.read_register(register) == value
    for address, piece in pieces:
        by_hand.write(address, piece)
    for register, value in settings:
        by_hand.write_register(register, value)
    size = image.size
    assert by_hand.read(base, size).tobytes() == driven.read(base, size).tobytes()
    for register in registers(made.config):
        for offset in register.offsets:
            assert by_hand.read_register(offset) == driven.read_register(offset), register.name


def test_every_region_is_loaded(images):
    """A test of the test above: one flipped byte anywhere makes a difference."""
    content = images["4x8"].path.read_bytes()
    _, _, pieces = documented(content, 0)
    board = board_with_noise(images["4x8"], 0)
    read_image(images["4x8"].path).load(board)
    for address, piece in pieces:
        assert board.read(address, len(piece)).tobytes() == piece
        assert bytes([piece[0] ^ 1]) != board.read(address, 1).tobytes()


def test_programs_are_relocated_in_their_addresses_alone(images):
    """Every address of a descriptor and nothing else: sizes and distances stay."""
    made = images["4x8"]
    image = read_image(made.path)
    low, high = (image.layout(made.model.config, base) for base in (0, 1 << 20))
    relocated = set(image.relocations)
    for kind, start in low.programs.items():
        pairs = zip(low.program(kind, 2), high.program(kind, 2), strict=True)
        for number, (here, there) in enumerate(pairs):
            at = start + number * DESCRIPTOR_BYTES
            members = ("plane", "residual", "groups", "activations", "results", "ranking")
            members += ("first", "second")
            moved = [m for m in members if getattr(there, m) != getattr(here, m)]
            words = [word for word in range(at, at + DESCRIPTOR_BYTES, 8) if word in relocated]
            assert len(words) == len(moved)
            if here.kind in (DescriptorKind.GEMM, DescriptorKind.ATTENTION):
                assert {"plane", "activations", "results"} <= set(moved)
            if here.kind is DescriptorKind.VECTOR:
                assert "first" in moved
            distances = [(each.stride, each.inner, each.outer) for each in (here, there)]
            assert distances[0] == distances[1]
            assert all(getattr(there, m) - getattr(here, m) == 1 << 20 for m in moved)


def test_models_without_an_encoding():
    model = drafted_model("llama", SEED, hidden=20)
    image = model_image(system(), model)
    assert image.settings.length == 0 and not image.encoded_names
    board = AcceleratorModel(system(), image.size)
    check(Session(model, board=board, image=image), [1, 2, 3], Settings(4))


def test_settings_that_the_accelerator_cannot_have_are_refused():
    model = drafted_model("llama", SEED)
    for settings, match in (
        (Settings(8), "rows is 8; this accelerator's array has 4"),
        (Settings(4, choices=5), "choices is 5; this accelerator ranks 1 to 4"),
        (Settings(4, reranked=5), "reranked is 5; this accelerator ranks 0"),
    ):
        with pytest.raises(ValueError, match=match):
            model_image(replace(system(), choices=4), model, settings=settings)


def test_an_image_says_what_is_encoded(images):
    made = images["4x8"]
    image = read_image(made.path)
    for given in ({"encoded": made.encoded}, {"capacity": 20}):
        with pytest.raises(ValueError, match="an image says what is encoded"):
            Session(made.model, board=AcceleratorModel(made.config, 1 << 20), image=image, **given)


# What is refused. Nothing has been written to the board by then.


def assert_refused(path: Path, made: SimpleNamespace, match: str, board: Written | None = None):
    """A session on an image file fails in one line, before it writes to memory or a register."""
    board = board or Written(made.config, 1 << 20)
    with pytest.raises(ValueError, match=match) as error:
        Session(made.model, board=board, image=read_image(path))
    assert board.written == []
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert any(remedy in str(error.value) for remedy in ("make", "copy it again", "speq image"))


def changed(path: Path, made: SimpleNamespace, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(made.path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def resealed(content: bytearray) -> None:
    """Give a changed header the checksum that it should have."""
    (header_bytes,) = struct.unpack_from("<I", content, 40)
    struct.pack_into("<I", content, 12, zlib.crc32(content[16:header_bytes]))


#: Offset, form and name of the header's fields.
FIELDS = {
    "file_bytes": (16, "<Q"),
    "memory_bytes": (24, "<Q"),
    "write_offset": (32, "<Q"),
    "header_bytes": (40, "<I"),
    "regions": (44, "<I"),
    "registers": (48, "<I"),
    "relocations": (52, "<I"),
    "alignment": (56, "<I"),
    "capacity": (60, "<I"),
    "vocabulary": (64, "<I"),
    "context": (68, "<I"),
    "drafted_outputs": (72, "<I"),
    "reranked": (76, "<I"),
    "digest": (80, "<Q"),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("sealed", [False, True], ids=["damaged", "forged"])
def test_header_fields_are_checked(images, tmp_path, name, sealed):
    """Each field, when its checksum is wrong and when it is right: small changes and large ones."""
    made = images["4x8"]
    offset, form = FIELDS[name]
    (value,) = struct.unpack_from(form, made.path.read_bytes(), offset)
    step = made.config.engine.cols if name == "capacity" else 1  # it counts in whole tiles
    largest = (1 << 8 * struct.calcsize(form)) - 1
    for other in {value + step, value - step if value else 2, 0, largest}:
        if other == value:
            continue

        def change(content: bytearray, other: int = other) -> None:
            struct.pack_into(form, content, offset, other)
            if sealed and name != "header_bytes":
                resealed(content)

        path = changed(tmp_path / "changed.image", made, change)
        assert_refused(path, made, "." if sealed else "damaged|truncated")


def test_damaged_names_and_tables_are_noticed(images, tmp_path):
    """A flipped bit of any word of the header, and of the checksum itself."""
    made = images["4x8"]
    (header_bytes,) = struct.unpack_from("<I", made.path.read_bytes(), 40)
    for offset in (*range(12, 176, 4), *range(176, header_bytes, 97)):
        path = changed(
            tmp_path / "changed.image",
            made,
            lambda content, offset=offset: content.__setitem__(offset, content[offset] ^ 4),
        )
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            read_image(path)


@pytest.mark.parametrize(
    ("table", "form", "field", "match"),
    [
        (0, "<I", 0, "no kind of this version|has a content|as this version makes it"),
        (0, "<Q", 8, "not in its place|as this version"),
        (0, "<Q", 16, "not in its place"),
        (0, "<Q", 24, "not in its place in the file"),
        (0, "<I", 32, "no name|as this version"),
        (1, "<I", 0, "there is no register|no accelerator"),
        (1, "<I", 4, "no action|there is no register|register ID is 0x0"),
        (1, "<Q", 8, "no accelerator that this driver knows"),
        (2, "<Q", 0, "relocation at .* is not of a word of a program|as this version"),
    ],
)
def test_forged_tables_are_refused(images, tmp_path, table, form, field, match):
    """First entries, with a checksum that is right."""
    made = images["4x8"]
    content = made.path.read_bytes()
    regions, settings, _ = struct.unpack_from("<3I", content, 44)
    offset = 176 + (0, 64 * regions, 64 * regions + 16 * settings)[table] + field
    (value,) = struct.unpack_from(form, content, offset)
    for other in (value ^ 8, value ^ 1, (1 << 8 * struct.calcsize(form)) - 1):

        def change(content: bytearray, other: int = other) -> None:
            struct.pack_into(form, content, offset, other)
            resealed(content)

        assert_refused(changed(tmp_path / "changed.image", made, change), made, match)


def test_registers_that_no_image_may_write_are_refused(images, tmp_path):
    """CONTROL, say, which would start a run."""
    made = images["4x8"]
    image = read_image(made.path)
    offsets = [s.offset for s in image.registers]
    index = [s.action for s in image.registers].index(Action.WRITE)
    at = 176 + 64 * len(image.parts) + 16 * index
    for name in ("CONTROL", "STATUS", "IRQ_STATUS", "HISTORY"):
        (register,) = (r for r in registers(made.config) if r.name == name)

        def change(content: bytearray, offset: int = register.offset) -> None:
            assert struct.unpack_from("<I", content, at) == (offsets[index],)
            struct.pack_into("<I", content, at, offset)
            resealed(content)

        path = changed(tmp_path / "changed.image", made, change)
        assert_refused(path, made, f"there is no register at {register.offset:#x} for WRITE")


def test_damage_of_any_region_is_noticed(images, tmp_path):
    """The first and last byte of each; the error says which."""
    made = images["8x16"]
    image = read_image(made.path)
    content = bytearray(made.path.read_bytes())
    path = tmp_path / "changed.image"
    given = [part for part in image.parts if part.kind.is_given]
    position = struct.unpack_from("<I", content, 40)[0]
    for part in given:
        for place in (position, position + part.size - 1):
            content[place] ^= 0x10
            path.write_bytes(content)
            content[place] ^= 0x10
            named = f"{describe(part)} is damaged, its checksum differs: copy it again"
            if part is given[0] and place == position:
                assert_refused(path, made, named)
            with pytest.raises(ValueError, match=named):
                read_image(path)
        position += part.size
    assert position == len(content)


def test_truncated_files_and_other_files_are_refused(images, tmp_path):
    made = images["4x8"]
    content = made.path.read_bytes()
    (header_bytes,) = struct.unpack_from("<I", content, 40)
    path = tmp_path / "short.image"
    for length in (9, 15, 16, 100, 175, 176, 300, header_bytes - 1, header_bytes, len(content) - 1):
        path.write_bytes(content[:length])
        assert_refused(path, made, f"{path} is truncated")
    path.write_bytes(content + b"\0")
    assert_refused(path, made, "is too long: it has")
    for other in (b"", b"SPEQ", b"{}", bytes(1000)):
        path.write_bytes(other)
        assert_refused(path, made, "is no image: it does not begin like one of speq image")
    with pytest.raises(OSError, match="directory"):
        read_image(tmp_path)


def test_other_versions_are_refused(images, tmp_path):
    made = images["4x8"]
    for version in (0, 2):
        path = changed(
            tmp_path / "other.image",
            made,
            lambda content, version=version: struct.pack_into("<I", content, 8, version),
        )
        assert_refused(path, made, f"its version is {version}, expected 1: make it again")


def test_images_for_another_accelerator_are_refused(images):
    """Whatever differs is named, and nothing is written."""
    made = images["4x8"]
    small = SMALL
    for config, differences in (
        (system(replace(small, cols=16)), ["ARRAY.cols 8 instead of 16"]),
        (system(replace(small, rows=8)), ["ARRAY.rows 4 instead of 8"]),
        (system(replace(small, max_k=512)), ["MAX_K 256 instead of 512"]),
        (replace(system(), choices=4), ["MAX_CHOICES 8 instead of 4"]),
        (replace(system(), history=0), ["HISTORY_SIZE 2048 instead of 0"]),
        (replace(system(), query_heads=32), ["VECTOR.query_heads 64 instead of 32"]),
        (system(weights=64), ["BUS.weights_bytes 16 instead of 8"]),
        (
            system(replace(small, format=FormatConfig(32, 1))),
            ["FORMAT.group 64 instead of 32", "FORMAT.split 2 instead of 1"],
        ),
    ):
        board = Written(config, 1 << 20)
        for difference in differences:
            assert_refused(made.path, made, rf"for another accelerator.* {difference}", board)
        image = read_image(made.path)
        with pytest.raises(ValueError, match="for another accelerator"):
            image.load(board)
        assert board.written == []


def test_images_of_another_model_are_refused(images):
    """Other dimensions, and one bit of a weight that is not in the image."""
    made = images["4x8"]
    weights = made.model.weights
    norm = weights["final_norm"].clone()
    norm[3] = -norm[3]
    for model in (
        drafted_model("llama", SEED + 1),
        drafted_model("llama", SEED, hidden=40),
        replace(made.model, weights=weights | {"final_norm": norm}),
    ):
        other = SimpleNamespace(model=model, config=made.config)
        assert_refused(made.path, other, "is of random llama, whose weights are not those of")
    # The same weights, but other positions.
    config = replace(made.model.config, context=40)
    other = SimpleNamespace(model=replace(made.model, config=config), config=made.config)
    assert_refused(made.path, other, "is not as this version makes it")


def test_load_addresses_that_are_impossible_are_refused(images):
    made = images["4x8"]
    image = read_image(made.path)
    board = Written(made.config, 1 << 20)
    for base, match in (
        (32, "expected a multiple of 4096"),
        ((1 << 40) - 4096, "addresses have 40"),
    ):
        with pytest.raises(ValueError, match=match):
            image.load(board, base)
    with pytest.raises(ValueError, match=r"needs \d+ bytes of memory, not 4096"):
        Session(made.model, board=board, memory=Region(0, 4096), image=image)
    assert board.written == []


def test_programs_of_another_version_are_refused(images, tmp_path):
    """A file that is intact, but whose program is another one than the driver serves."""
    made = images["4x8"]
    image = read_image(made.path)

    def other(part):
        content = image.content(part).copy()
        if part.name == "verify":
            content[DESCRIPTOR_BYTES + 8] ^= 1
        return content

    path = tmp_path / "other.image"
    write_image(path, replace(image, content=other))
    assert_refused(path, made, "is not as this version makes it: make it again")


@pytest.mark.parametrize("name", CONFIGS)
def test_other_weights_are_refused(images, tmp_path, name):
    """A file that is intact and names the right model, but holds a weight that is another one."""
    made = images[name]
    image = read_image(made.path)
    path = tmp_path / "other.image"
    kinds = {part.kind: part for part in image.parts if part.kind in WEIGHTS}
    assert len(kinds) == (3 if name == "4x8" else 4)
    for changed_part in kinds.values():

        def other(part, changed_part=changed_part):
            content = image.content(part).copy()
            if part == changed_part:
                content[0] ^= 1
            return content

        write_image(path, replace(image, content=other))
        assert_refused(path, made, f"{changed_part.name} does not decode to the weights of random")


def test_what_a_driver_needs_of_a_board_is_enough(images):
    """An image is loaded with the calls of `Board` alone."""
    made = images["4x8"]
    image: Image = read_image(made.path)
    base = made.config.load_alignment
    board: Board = AcceleratorModel(made.config, image.size, base)
    image.load(board, base)
    image.write_registers(board, base)
    r = Registers(board, made.config)
    assert r["READ_BASE"] == base and r["WRITE_LIMIT"] == base + image.size - 1
    assert r["WRITE_BASE"] == base + image.write_offset and r["READ_LIMIT"] == r["WRITE_LIMIT"]
    assert r["SCRATCH"] == base + image.scratch.start
