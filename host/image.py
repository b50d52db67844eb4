# SPDX-License-Identifier: Apache-2.0
"""Images: all that a host puts into the accelerator's memory and registers, at any address.

An `Image` comes from a model (`model_image`) or from a file (`speq.host.image_file`); `Image.load`
is the one way by which weights and programs get into memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from speq.host.board import Board
from speq.host.checks import (
    check_encoded,
    check_model,
    check_settings,
    default_capacity,
)
from speq.host.layout import (
    PROGRAM_NAMES,
    RING_LOG2,
    Kind,
    Part,
    Region,
    encoded_tensor,
    plain_words,
    weight_planes,
)
from speq.host.programs import ModelLayout
from speq.host.registers import (
    ALL_INTERRUPTS,
    configuration,
    constant_words,
    cost_words,
    speculation_words,
    split,
)
from speq.host.tables import TABLE_PARTS, table_part
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.register_map import Register, registers
from speq.model.checkpoint import Model, ModelConfig
from speq.model.format import EncodedTensor
from speq.model.settings import DEFAULT_HISTORY, Policy, Settings

_NAME_BYTES = 64  # that a file holds
_ADDRESS = 8  # bytes of an address in a program
#: What to do about an image that is of no use.
AGAIN = "make it again with speq image"


class Action(Enum):
    """What is done with a register; the numbers are those of the files."""

    #: It must hold the value.
    EXPECT = 0
    WRITE = 1
    #: The value and the load address are added and written to two registers, the lower half first.
    WRITE_ADDRESS = 2


class Setting(NamedTuple):
    """What is done with the register at a byte offset."""

    offset: int
    action: Action
    value: int


@dataclass(frozen=True)
class _Plan:
    """All of an image that follows from dimensions and settings, for a load address of 0."""

    alignment: int
    size: int
    write_offset: int
    parts: tuple[Part, ...]
    registers: tuple[Setting, ...]
    relocations: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Image:
    """What a host puts into memory and registers. Offsets are from the load address.

    Attributes
    ----------
    name : str
        Of the model, for people.
    digest : bytes
        Of the model, as `Model.digest`.
    vocabulary, context : int
        The model's tokens and positions.
    capacity : int
        Entries of the KV cache.
    drafted_outputs : int
        Of the head, in draft passes; 0: all.
    reranked : int
        Tokens that the program of draft passes re-ranks.
    alignment : int
        The load address is a multiple of it.
    size : int
        Bytes of memory.
    write_offset : int
        Where the region begins that the accelerator writes, up to the end; it reads everything.
    parts : Part by rising offset, which is its `start`
    registers : Setting in the order in which they are to be checked or written
    relocations : rising offsets of 64-bit words to which the load address is added
    content : function of a given part to uint8 [size], as for a load address of 0
    source : what errors call it
    """

    name: str
    digest: bytes
    vocabulary: int
    context: int
    capacity: int
    drafted_outputs: int
    reranked: int
    alignment: int
    size: int
    write_offset: int
    parts: tuple[Part, ...] = field(repr=False)
    registers: tuple[Setting, ...] = field(repr=False)
    relocations: tuple[int, ...] = field(repr=False)
    content: Callable[[Part], np.ndarray] = field(repr=False)
    source: str = "the image"
    _checked: list[Model] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def config(self) -> AcceleratorConfig:
        """The accelerator that it is for. Raises ValueError if there can be none such."""
        words = {s.offset: s.value for s in self.registers if s.action is Action.EXPECT}
        known = _registers(AcceleratorConfig())
        return configuration(lambda name: words.get(known[name].offset, 0))

    @cached_property
    def settings(self) -> Settings:
        """How its registers tell the accelerator to speculate. Raises ValueError if it cannot."""
        known = _registers(self.config)
        words = {s.offset: s.value for s in self.registers if s.action is Action.WRITE}

        def number(name: str) -> int:
            content = b"".join(
                struct.pack("<I", words.get(offset, 0)) for offset in known[name].offsets
            )
            return int.from_bytes(content, "little")

        def table(name: str) -> tuple[int, ...]:
            return tuple(number(name).to_bytes(4 * len(known[name].offsets), "little"))

        policy = Policy(
            chain_costs=table("CHAIN_COSTS"),
            alternate_costs=table("ALTERNATE_COSTS"),
            limit=number("COST_LIMIT"),
        )
        if self.config.history:
            policy = replace(
                policy, guess_costs=table("GUESS_COSTS"), guess_limit=number("GUESS_LIMIT")
            )
        return Settings(
            self.config.engine.rows,
            number("DRAFT_LENGTH"),
            struct.unpack("<f", struct.pack("<I", number("THRESHOLD")))[0],
            number("CHOICES"),
            self.reranked,
            policy,
            self.config.history or DEFAULT_HISTORY,
        )

    @cached_property
    def scratch(self) -> Region:
        """The window of the scratch memory, which holds nothing before a run; empty if there is
        none."""
        if not self.config.scratch:
            return Region(0, 0)
        offset = _registers(self.config)["SCRATCH"].offset
        start = next(s.value for s in self.registers if s.offset == offset)
        return Region(start, start + self.config.scratch)

    @property
    def encoded_names(self) -> list[str]:
        """Names of the linear layers that are encoded."""
        return [part.name for part in self.parts if part.kind is Kind.DRAFT_PLANE]

    def layout(self, model: ModelConfig, base: int = 0) -> ModelLayout:
        """The memory of its model behind a load address. Raises ValueError if it does not fit."""
        return ModelLayout(
            self.config,
            model,
            self.encoded_names,
            self.capacity,
            base,
            drafted_outputs=self.drafted_outputs or None,
        )

    def encoded(self, model: Model) -> dict[str, EncodedTensor]:
        """The encoded layers of its model, by name, tiled for the accelerator's array.

        Raises what `check_model` does.
        """
        self.check_model(model)
        return self._encoded(model)

    def _encoded(self, model: Model) -> dict[str, EncodedTensor]:
        planes: dict[str, list[np.ndarray]] = {name: [] for name in self.encoded_names}
        for part in self.parts:
            if part.name in planes and part.kind.is_given:
                planes[part.name].append(self.content(part))
        layout = self.layout(model.config)
        return {
            name: encoded_tensor(name, layout.weights[name], parts, self.config, layout.order(name))
            for name, parts in planes.items()
        }

    def check_model(self, model: Model) -> None:
        """Raises ValueError unless it is of this model, made as this version would make it, and has
        the model's weights bit for bit."""
        if any(checked is model for checked in self._checked):
            return
        if self.digest != model.digest:
            raise ValueError(
                f"{self.source} is of {self.name}, whose weights are not those of {model.name}: "
                "give the model that it was made of, or make an image of this one"
            )
        try:
            layout = self.layout(model.config)
            plan = _plan(layout, self.capacity, self.settings)
            same = all(getattr(self, f.name) == getattr(plan, f.name) for f in fields(_Plan))
            sizes = (model.config.vocab_size, model.config.context)
            same = same and (self.vocabulary, self.context) == sizes
        except ValueError as error:
            raise ValueError(f"{self.source} is not as this version makes it: {error}") from error
        for part in self.parts:
            if same and part.kind is Kind.PROGRAM:
                expected = layout.program_content(_PASS_KINDS[part.name], self.reranked)
                same = self.content(part).tobytes() == expected
        if not same:
            raise ValueError(f"{self.source} is not as this version makes it: {AGAIN}")
        self._check_weights(model)
        self._checked.append(model)

    def _check_weights(self, model: Model) -> None:
        """Raises ValueError, naming the layer, unless all weights are the model's."""
        layout, tensors = self.layout(model.config), self._encoded(model)
        wrong = [name for name, tensor in tensors.items() if not _decodes(tensor, model, name)]
        for part in self.parts:
            if part.kind is Kind.PLAIN_WEIGHTS:
                order = layout.order(part.name)
                weight = model.linear_weight(part.name)
                expected = _bytes(plain_words(weight, self.config, order))
            elif part.kind in TABLE_PARTS:
                expected = _bytes(table_part(part, layout, model))
            else:
                continue
            if not np.array_equal(self.content(part), expected):
                wrong.append(part.name or part.kind.name.lower())
        if wrong:
            raise ValueError(
                f"{self.source}: {wrong[0]} does not decode to the weights of {model.name}: {AGAIN}"
            )

    def check_board(self, board: Board) -> None:
        """Raises ValueError, naming what differs, unless it is for the accelerator on a board."""
        known = {register.offset: register for register in registers(self.config)}
        different = []
        for setting in self.registers:
            if setting.action is not Action.EXPECT:
                continue
            found = board.read_register(setting.offset)
            register = known[setting.offset]
            wanted, has = (split(register, value) for value in (setting.value, found))
            different += [
                f"{register.name}.{name} {wanted[name]} instead of {has[name]}"
                for name in wanted
                if wanted[name] != has[name]
            ]
            if not wanted and setting.value != found:
                different.append(f"{register.name} {setting.value} instead of {found}")
        if different:
            raise ValueError(
                f"{self.source} is for another accelerator, with {', '.join(different)}: make one "
                "for this accelerator with speq image --config and the description of its Verilog"
            )

    def load(self, board: Board, base: int = 0) -> None:
        """Write all that is given to a board's memory behind a load address.

        Nothing has been written if this raises ValueError because it is for another accelerator,
        or because of the address. What `content` raises may come later.
        """
        self.check_board(board)
        if base % self.alignment:
            raise ValueError(f"base is {base:#x}; expected a multiple of {self.alignment}")
        if base + self.size > 1 << self.config.address_bits:
            raise ValueError(
                f"{self.source} ends at {base + self.size:#x}; addresses have "
                f"{self.config.address_bits} bits"
            )
        for part in self.parts:
            if not part.kind.is_given:
                continue
            content = self.content(part)
            if part.kind is Kind.PROGRAM and base:
                content = self._relocated(part, content, base)
            board.write(base + part.start, content)

    def _relocated(self, part: Part, content: np.ndarray, base: int) -> np.ndarray:
        """A part's content with the load address added where it belongs."""
        words = content.view("<u8").copy()
        offsets = np.array(self.relocations, np.uint64)
        ends = np.array((part.start, part.start + part.size), np.uint64)
        first, last = np.searchsorted(offsets, ends)
        words[(offsets[first:last] - ends[0]) // _ADDRESS] += np.uint64(base)
        return words.view(np.uint8)

    def write_registers(self, board: Board, base: int = 0) -> None:
        """Write all registers that a run needs, but for what differs from run to run."""
        for offset, action, value in self.registers:
            if action is Action.WRITE:
                board.write_register(offset, value)
            elif action is Action.WRITE_ADDRESS:
                address = value + base
                board.write_register(offset, address & 0xFFFFFFFF)
                board.write_register(offset + 4, address >> 32)


_PASS_KINDS = {name: kind for kind, name in PROGRAM_NAMES.items()}


def model_image(
    config: AcceleratorConfig,
    model: Model,
    encoded: Mapping[str, EncodedTensor] | None = None,
    *,
    capacity: int | None = None,
    settings: Settings | None = None,
) -> Image:
    """The image of a model. Planes are made when `Image.content` is asked for them.

    Parameters
    ----------
    config : AcceleratorConfig
    model : Model
    encoded : encoded linear layers by name
        In the format of the accelerator, with any number of columns; other layers are taken as
        plain FP16. Without any, there is no drafting.
    capacity : int, optional
        Entries of the KV cache; `default_capacity` when not given.
    settings : Settings, optional
        What the registers of speculation hold.

    Raises
    ------
    ValueError
        If the model does not fit the accelerator, which cannot read the encoding or speculate so;
        from `Image.content`, if the encoding does not decode to the model's weights bit for bit.
    """
    config = configuration(constant_words(config).__getitem__)  # as a driver sees it
    encoded = encoded or {}
    check_encoded(config, encoded)
    check_model(model)
    rows, history = config.engine.rows, config.history or DEFAULT_HISTORY
    settings = settings or Settings(rows, history=history)
    check_settings(config, settings)
    if not encoded:
        settings = replace(settings, draft_length=0)
    drafted = encoded["head"].drafted_outputs if "head" in encoded else None
    if capacity is None:
        capacity = default_capacity(config, model.config)
    layout = ModelLayout(config, model.config, encoded, capacity, drafted_outputs=drafted)

    @lru_cache(maxsize=1)
    def planes(name: str) -> dict[Kind, np.ndarray]:
        if name not in encoded:
            words = plain_words(model.linear_weight(name), config, layout.order(name))
            return {Kind.PLAIN_WEIGHTS: words}
        if not _decodes(encoded[name], model, name):
            raise ValueError(f"{name} does not decode to the weights of {model.name}")
        kinds = (Kind.DRAFT_PLANE, Kind.RESIDUAL_PLANE, Kind.GROUP_BYTES)
        return dict(
            zip(kinds, weight_planes(encoded[name], config, layout.order(name)), strict=True)
        )

    def content(part: Part) -> np.ndarray:
        if part.kind is Kind.PROGRAM:
            program = layout.program_content(_PASS_KINDS[part.name], settings.reranked)
            return np.frombuffer(program, np.uint8)
        if part.kind in TABLE_PARTS:
            return _bytes(table_part(part, layout, model))
        return _bytes(planes(part.name)[part.kind])

    return Image(
        name=_stored_name(model.name),
        digest=model.digest,
        vocabulary=model.config.vocab_size,
        context=model.config.context,
        capacity=capacity,
        drafted_outputs=drafted or 0,
        reranked=settings.reranked,
        content=content,
        **_members(_plan(layout, capacity, settings)),
    )


def _members(plan: _Plan) -> dict[str, Any]:
    return {f.name: getattr(plan, f.name) for f in fields(plan)}


def _decodes(tensor: EncodedTensor, model: Model, name: str) -> bool:
    """Whether a tensor decodes to a model's weights, bit for bit."""
    weight = model.linear_weight(name).contiguous()
    return torch.equal(tensor.decode().view(torch.int16), weight.view(torch.int16))


def _bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of numbers, little-endian, uint8 [size]."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8)


def _stored_name(name: str) -> str:
    """A model's name as a file holds it: printable, and not too long."""
    printable = "".join(c if c.isprintable() else "?" for c in name)
    return printable.encode()[:_NAME_BYTES].decode(errors="ignore")


def _registers(config: AcceleratorConfig) -> dict[str, Register]:
    return {register.name: register for register in registers(config)}


def _plan(layout: ModelLayout, capacity: int, settings: Settings) -> _Plan:
    """An image but for its weights, from a layout behind address 0 with a KV cache of so many
    entries."""
    return _Plan(
        alignment=layout.config.load_alignment,
        size=layout.size,
        write_offset=layout.write.start,
        parts=tuple(layout.parts),
        registers=tuple(_settings(layout, settings)),
        relocations=tuple(_relocations(layout, capacity, settings.reranked)),
    )


def _settings(layout: ModelLayout, settings: Settings) -> Iterator[Setting]:
    """Registers that must have a value, then those that a run needs."""
    known = _registers(layout.config)
    for name, value in constant_words(layout.config).items():
        yield Setting(known[name].offset, Action.EXPECT, value)
    addresses = {
        "READ_BASE": layout.read.start,
        "READ_LIMIT": layout.read.stop - 1,
        "WRITE_BASE": layout.write.start,
        "WRITE_LIMIT": layout.write.stop - 1,
        "PASS_PROGRAM": layout.programs[PassKind.SINGLE],
        "DRAFT_PROGRAM": layout.programs[PassKind.DRAFT],
        "VERIFY_PROGRAM": layout.programs[PassKind.VERIFY],
        "RING": layout.ring,
        "MOVE_PROGRAM": layout.programs[PassKind.MOVE],
    }
    if layout.config.scratch:
        addresses["SCRATCH"] = layout.scratch.start
    for name, value in addresses.items():
        yield Setting(known[name].offset, Action.WRITE_ADDRESS, value)
    numbers = {
        "IRQ_ENABLE": ALL_INTERRUPTS,
        "PROGRAM_LENGTH": layout.longest_program(settings.reranked),
        "HOST_TIMEOUT": 0,
        "PASS_ROWS": 1,
        "DRAFT_LENGTH": settings.length,
        "TOKEN_LIMIT": 1,
        "RING_LOG2": RING_LOG2,
    }
    for name, value in (numbers | speculation_words(layout.config, settings)).items():
        words = cost_words(value) if isinstance(value, tuple) else [known[name].pack(value)]
        for offset, word in zip(known[name].offsets, words, strict=True):
            yield Setting(offset, Action.WRITE, word)


def _relocations(layout: ModelLayout, capacity: int, reranked: int) -> Iterator[int]:
    """Offsets of the words in the programs that are others behind another load address."""
    config = layout.config
    ports = {name: replace(getattr(config, name), address_bits=64) for name in ("weights", "data")}
    moved = ModelLayout(
        replace(config, **ports),
        layout.model,
        [name for name, weights in layout.weights.items() if weights.encoded],
        capacity,
        config.load_alignment,
        drafted_outputs=layout.weights["head"].drafted,
    )
    for kind in layout.programs:
        here, there = (
            np.frombuffer(each.program_content(kind, reranked), "<u8") for each in (layout, moved)
        )
        for index in np.flatnonzero(here != there).tolist():
            yield layout.programs[kind] + _ADDRESS * index
