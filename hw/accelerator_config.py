# SPDX-License-Identifier: Apache-2.0
"""The whole accelerator's configuration, and the records that its units exchange."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from amaranth.hdl import unsigned
from amaranth.lib import data, enum

from speq.hw.engine_config import (
    DRAFT_LANES,
    FP16_BITS,
    EngineConfig,
    Mode,
    check_power_of_two,
)
from speq.hw.memory.axi import PAGE_BYTES, AxiConfig

#: Bits of a token id.
TOKEN_BITS = 24

_MIN_COLS = 4
_USUAL_LANES = 8
_CHOICES = (4, 8)
_HISTORIES = tuple(1 << i for i in range(3, 17))
_MIN_SCRATCH, _MAX_SCRATCH = PAGE_BYTES, 1 << 24


class ErrorCode(enum.Enum, shape=unsigned(5)):
    """Why a run ended early. `register_map` explains them to users."""

    NONE = 0
    UNKNOWN_KIND = 1
    RESERVED = 2
    BAD_SIZE = 3
    MISALIGNED = 4
    NO_END = 5
    READ_OUTSIDE = 6
    READ_SLVERR = 7
    READ_DECERR = 8
    WRITE_OUTSIDE = 9
    WRITE_SLVERR = 10
    WRITE_DECERR = 11
    HOST_TIMEOUT = 12
    HOST_REFUSED = 13
    STOPPED = 14
    BAD_REGISTER = 15
    NONFINITE = 16
    MEMORY_TIMEOUT = 17


def _power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True, init=False)
class AcceleratorConfig:
    """Everything that determines the RTL of the accelerator.

    Parameters
    ----------
    engine : EngineConfig
        Its cols must be a power of two from 4, and it must be able to draft.
    weights : AxiConfig
        Of the port that reads weights and the KV cache. By default as wide as the array consumes
        (16 bits per column, but at most AXI4's 1024); a narrower one limits the speed.
    data : AxiConfig
        Of the port for everything else. By default as wide.
    choices : int
        Entries of a ranking, 4 or 8: most choices of a chain position.
    history : int
        Tokens that are searched for repetitions, a power of two from 8 to 65,536; 0: none, and no
        unit for it.
    lanes : int
        Elements that the vector unit takes in a cycle, a power of two from 4 to 64 and at most
        cols; by default 8, or cols if these are fewer. 0: no vector unit, for experiments with own
        programs; the driver has none for such an accelerator.
    query_heads : int
        Most query heads of a model, a power of two from 4 to 1,024: the vector unit keeps a sum
        for each of their rows.
    head_inputs : int
        Inputs of the smallest head whose results do not wait for noise in sampled decoding, so that
        only the last tile's ranking takes longer than in greedy decoding: a power of two up to
        4,096. The fewer, the more noise is made in a cycle.
    scratch : int
        Bytes of the scratch memory, a power of two from 4,096 to 2^24; 0: none. The default holds
        what SmolLM2-135M leaves for later in a pass of 8 rows, with a KV cache of up to 768
        entries; what exceeds it is in memory.

    Raises
    ------
    ValueError
        If a value is out of its range or two do not fit together.
    """

    engine: EngineConfig
    weights: AxiConfig
    data: AxiConfig
    choices: int
    history: int
    lanes: int
    query_heads: int
    head_inputs: int
    scratch: int

    def __init__(
        self,
        engine: EngineConfig | None = None,
        weights: AxiConfig | None = None,
        data: AxiConfig | None = None,
        choices: int = 8,
        history: int = 2048,
        lanes: int | None = None,
        query_heads: int = 64,
        head_inputs: int = 512,
        scratch: int = 1 << 19,
    ) -> None:
        if choices not in _CHOICES:
            raise ValueError(f"choices is {choices}; expected 4 or 8")
        object.__setattr__(self, "choices", choices)
        if history and history not in _HISTORIES:
            raise ValueError(
                f"history is {history}; expected 0 (none) or a power of two from {_HISTORIES[0]} "
                f"to {_HISTORIES[-1]}"
            )
        object.__setattr__(self, "history", history)
        engine = engine or EngineConfig()
        cols = engine.cols
        if cols < _MIN_COLS or cols & (cols - 1):
            raise ValueError(
                f"cols is {cols}; the accelerator needs a power of two from {_MIN_COLS}"
            )
        if not engine.draft_rows:
            raise ValueError("draft_rows is 0; the accelerator needs at least 1")
        object.__setattr__(self, "engine", engine)
        if lanes is None:
            lanes = min(_USUAL_LANES, cols)
        if lanes:
            check_power_of_two("lanes", lanes, 4, min(64, cols))
            if engine.rows > cols:
                raise ValueError(
                    f"rows is {engine.rows}; a vector unit needs at least as many columns "
                    f"({cols}), or take lanes 0"
                )
        object.__setattr__(self, "lanes", lanes)
        check_power_of_two("query_heads", query_heads, 4, 1024)
        object.__setattr__(self, "query_heads", query_heads)
        least = self.least_head_inputs(engine)
        check_power_of_two("head_inputs", head_inputs, least, max(least, 4096))
        object.__setattr__(self, "head_inputs", head_inputs)
        if scratch:
            check_power_of_two("scratch", scratch, _MIN_SCRATCH, _MAX_SCRATCH)
        object.__setattr__(self, "scratch", scratch)
        for name, port in (("weights", weights), ("data", data)):
            port = port or AxiConfig(data_bits=min(FP16_BITS * cols, 1024))
            if port.data_bits > FP16_BITS * cols:
                raise ValueError(
                    f"the {name} port's data width is {port.data_bits}; {cols} columns allow at "
                    f"most {FP16_BITS * cols}"
                )
            object.__setattr__(self, name, port)
        if self.weights.address_bits != self.data.address_bits:
            raise ValueError(
                f"address bits are {self.weights.address_bits} (weights) and "
                f"{self.data.address_bits} (data); expected the same"
            )

    @property
    def address_bits(self) -> int:
        """Bits of a byte address."""
        return self.data.address_bits

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes of one word of the activation store in memory: a power of two."""
        return _power_of_two(self.engine.activation_layout.size) // 8

    @property
    def alignment(self) -> int:
        """Bytes that the address of every buffer must be a multiple of: a beat of either port, or a
        descriptor."""
        return max(self.weights.beat_bytes, self.data.beat_bytes, 64)

    @property
    def load_alignment(self) -> int:
        """Bytes that the address of a model's memory must be a multiple of: a page, if there is a
        scratch memory, whose window begins at one."""
        return max(self.alignment, PAGE_BYTES if self.scratch else 1)

    @property
    def tile_number_bits(self) -> int:
        """Bits of the number of a tile of outputs: a token id without its column."""
        return TOKEN_BITS - (self.engine.cols - 1).bit_length()

    @property
    def tiles_bits(self) -> int:
        """Bits of the number of a product's tiles."""
        return (-(-self.engine.max_o // self.engine.cols)).bit_length()

    @property
    def history_bits(self) -> int:
        """Bits of a place in the history."""
        return (self.history - 1).bit_length()

    @classmethod
    def least_head_inputs(cls, engine: EngineConfig) -> int:
        """The least number that `head_inputs` can be: a lane of noise takes four columns or
        more."""
        return 4 * _power_of_two(cls._head_rows(engine))

    @staticmethod
    def _head_rows(engine: EngineConfig) -> int:
        """Rows whose logits come in the time of a tile of a head, an input per cycle. Those of a
        draft pass come in a quarter of it."""
        return max(engine.rows, DRAFT_LANES)

    @property
    def noise_lanes(self) -> int:
        """Columns whose noise comes at once: so many that a tile's logits are perturbed in the time
        of its product, if this has `head_inputs` or more."""
        rows, cols = self._head_rows(self.engine), self.engine.cols
        lanes = 1
        while rows * cols > lanes * self.head_inputs:
            lanes *= 2
        return lanes

    @property
    def noise_rounds(self) -> int:
        """Rounds of each lane's generator, 1, 2 or 5: as few as keep up with such a product."""
        rows, cols = self._head_rows(self.engine), self.engine.cols
        needed = rows * cols / (self.noise_lanes * self.head_inputs)
        return next((rounds for rounds in (1, 2) if rounds / 5 >= needed), 5)

    @property
    def job_layout(self) -> data.StructLayout:
        """One GEMM on memory, checked: what the controller asks of the datapath.

        `plane` is the draft plane (verify, draft) or the plain FP16 words (bypass), `residual` and
        `groups` the rest of an encoded tensor, each [tile][word][column]. `stride` is the distance
        of the plane's tiles in bytes, 0 if they follow each other. `activations` are `k` words
        (draft: ceil(k / 4)) of `activation_bytes`. Results go to `results` as [tile][token][column]
        in FP32 (FP16 if `half`); with `discard` they are not written. With `rank` they are ranked:
        those in `columns`, as outputs of the tiles from number `tile` on, with `keep` beside what
        has been ranked before, and with `whole` so that all entries of all rows are right, not
        those of row 0 and the first of each other row alone. With `again` the job is the one
        before, whose largest logits are known.
        """
        engine, address = self.engine, self.address_bits
        return data.StructLayout(
            {
                "mode": Mode,
                "k": engine.k_bits,
                "o": engine.o_bits,
                "tokens": engine.token_bits,
                "half": 1,
                "discard": 1,
                "rank": 1,
                "keep": 1,
                "whole": 1,
                "again": 1,
                "tile": self.tile_number_bits,
                "columns": engine.cols,
                "plane": address,
                "residual": address,
                "groups": address,
                "activations": address,
                "results": address,
                "stride": address,
            }
        )

    @property
    def ranked_layout(self) -> data.StructLayout:
        """One of the best outputs of a row: token id and FP32 logit; `valid` if there is one."""
        return data.StructLayout({"token": TOKEN_BITS, "logit": 32, "valid": 1})

    @property
    def ranking_layout(self) -> data.ArrayLayout:
        """The best outputs of a row, the best first; those that are not valid come last."""
        return data.ArrayLayout(self.ranked_layout, self.choices)


class PassKind(enum.Enum, shape=unsigned(2)):
    """Which program a pass runs."""

    SINGLE = 0
    DRAFT = 1
    VERIFY = 2
    MOVE = 3


def pass_layout(config: AcceleratorConfig) -> data.StructLayout:
    """One walk through a program: `rows` tokens behind `position` entries of the KV cache. With
    lanes: MOVE brings entry `source` to `position`."""
    return data.StructLayout(
        {"kind": PassKind, "rows": config.engine.token_bits, "position": config.engine.k_bits}
        | ({"source": config.engine.k_bits} if config.lanes else {})
    )
