# SPDX-License-Identifier: Apache-2.0
"""The accelerator's registers by name, and the configuration that they tell."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from speq.host.board import Board
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.register_map import MAX_STOP_TOKENS, Register, constants, registers
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.number_format import DRAFT_BITS, FormatConfig
from speq.model.settings import Settings

#: All interrupts, in IRQ_ENABLE and IRQ_STATUS.
ALL_INTERRUPTS = 0b111


class Registers:
    """The accelerator's registers by name.

    Parameters
    ----------
    board : Board
    config : AcceleratorConfig
        Of the accelerator; the default serves to read what it is.
    """

    def __init__(self, board: Board, config: AcceleratorConfig | None = None) -> None:
        self._board = board
        self._registers = {r.name: r for r in registers(config or AcceleratorConfig())}

    def __getitem__(self, name: str) -> int:
        """The content of a register."""
        return self.element(name, 0)

    def element(self, name: str, index: int) -> int:
        """The content of an element of an array of registers."""
        words = self._registers[name].words
        offsets = self._registers[name].offsets[index * words :][:words]
        return sum(self._board.read_register(o) << 32 * i for i, o in enumerate(offsets))

    def fields(self, name: str, index: int = 0) -> dict[str, int]:
        """The fields of a register."""
        return split(self._registers[name], self.element(name, index))

    def __setitem__(self, name: str, value: int | Mapping[str, int]) -> None:
        register = self._registers[name]
        content = register.pack(value)
        for i, offset in enumerate(register.offsets):
            self._board.write_register(offset, content >> 32 * i & 0xFFFFFFFF)

    def write_costs(self, name: str, costs: Sequence[int]) -> None:
        """Write a table of costs, a byte each, to a register or an array of registers."""
        for offset, word in zip(self._registers[name].offsets, cost_words(costs), strict=True):
            self._board.write_register(offset, word)

    def write_stop_tokens(self, tokens: Sequence[int]) -> None:
        """Write the tokens behind which runs end. Raises ValueError if there is no room for so
        many."""
        if len(tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"{len(tokens)} stop tokens; there is room for {MAX_STOP_TOKENS}")
        for offset, token in zip(self._registers["STOP_TOKEN"].offsets, tokens, strict=False):
            self._board.write_register(offset, token)
        self["STOP_TOKENS"] = len(tokens)

    def command(self, name: str) -> None:
        """Write one bit of CONTROL."""
        register = self._registers["CONTROL"]
        self["CONTROL"] = register.pack({f.name: int(f.name == name) for f in register.fields})


def cost_words(costs: Sequence[int]) -> list[int]:
    """A table of costs, a byte each, as the words of its registers."""
    return np.array(costs, np.uint8).view("<u4").tolist()


def split(register: Register, content: int) -> dict[str, int]:
    """The fields of a register's content."""
    return {f.name: content >> f.low & (1 << f.bits) - 1 for f in register.fields}


def read_configuration(board: Board) -> AcceleratorConfig:
    """The configuration of the accelerator on a board.

    Raises
    ------
    ValueError
        If it is none, or one that this driver does not know.
    """
    return configuration(Registers(board).__getitem__)


def configuration(read: Callable[[str], int]) -> AcceleratorConfig:
    """The configuration that the constant registers tell, whose contents `read` gives by name.

    Raises ValueError as `read_configuration` does.
    """
    expected = constant_words(AcceleratorConfig())
    for name in ("ID", "VERSION"):
        if (value := read(name)) != expected[name]:
            raise ValueError(
                f"register {name} is {value:#010x}; expected {expected[name]:#010x}: no "
                "accelerator that this driver knows"
            )
    r = {name: read(name) for name in expected}
    known = {register.name: register for register in registers(AcceleratorConfig())}
    array, number_format, bus, vector = (
        split(known[name], r[name]) for name in ("ARRAY", "FORMAT", "BUS", "VECTOR")
    )
    if number_format.pop("width") != DRAFT_BITS:
        raise ValueError(f"FORMAT is {r['FORMAT']:#x}: no draft weights of {DRAFT_BITS} bits")
    address_bits = r["ADDRESS_BITS"]
    weights, data = (
        AxiConfig(data_bits=8 * bus[f"{port}_bytes"], address_bits=address_bits)
        for port in ("weights", "data")
    )
    engine = EngineConfig(
        format=FormatConfig(**number_format), max_k=r["MAX_K"], max_o=r["MAX_O"], **array
    )
    config = AcceleratorConfig(
        engine,
        weights,
        data,
        choices=r["MAX_CHOICES"],
        history=r["HISTORY_SIZE"],
        lanes=vector["lanes"],
        query_heads=vector["query_heads"],
        scratch=r["SCRATCH_SIZE"],
    )
    if bus["activation_bytes"] != config.activation_bytes:
        raise ValueError(
            f"an activation word has {bus['activation_bytes']} bytes; this driver expects "
            f"{config.activation_bytes}"
        )
    return config


def constant_words(config: AcceleratorConfig) -> dict[str, int]:
    """The contents of the registers that never change, by name."""
    known = {register.name: register for register in registers(config)}
    return {name: known[name].pack(value) for name, value in constants(config).items()}


def speculation_words(
    config: AcceleratorConfig, settings: Settings
) -> dict[str, int | tuple[int, ...]]:
    """What the registers of speculation hold for these settings, by name: numbers, and tables of
    costs. DRAFT_LENGTH, which changes during a run, is left out; so is what a history is for, if
    the accelerator has none."""
    policy = settings.policy
    words: dict[str, int | tuple[int, ...]] = {
        "THRESHOLD": threshold_bits(settings.threshold),
        "CHOICES": settings.offered,
        "COST_LIMIT": policy.limit,
        "CHAIN_COSTS": policy.chain_costs,
        "ALTERNATE_COSTS": policy.alternate_costs,
    }
    if config.history:
        words |= {"GUESS_LIMIT": policy.guess_limit, "GUESS_COSTS": policy.guess_costs}
    return words


def threshold_bits(threshold: float) -> int:
    """The smallest FP32 number that is at least `threshold`, as bits: FP32 margins are below one if
    and only if they are below the other."""
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    if float(rounded) < threshold:  # NumPy would compare in FP32
        rounded = np.nextafter(rounded, np.float32(np.inf))
    return struct.unpack("<I", struct.pack("<f", rounded))[0]
