# SPDX-License-Identifier: Apache-2.0
"""The output-stationary array of PEs with its decoders and rounders."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.array.exponent_remap import ExponentRemap
from speq.hw.array.operands import (
    activation_layout,
    multiples,
    significand_digits,
    weight_layout,
)
from speq.hw.array.pe import Pe
from speq.hw.array.rounder import Rounder
from speq.hw.common.logic import any_of
from speq.hw.common.unit import Unit
from speq.hw.engine_config import DRAFT_LANES, FP16_BITS, EngineConfig, Mode
from speq.model.number_format import NONFINITE_BASE

_NONFINITE_EXPONENT = 31
_NIBBLE_BITS = FP16_BITS // DRAFT_LANES
_FP16 = data.StructLayout({"mantissa": 10, "exponent": 5, "negative": 1})


def control_layout(config: EngineConfig, tag: object) -> data.StructLayout:
    """What accompanies one step of the array.

    Members: `valid`, the step does work; `mode`; `first` and `last` step of a tile; `tokens`,
    results are wanted from rows 0 .. tokens - 1 (at least 1); `half`, round to FP16; `tag`, any
    bits of the caller's, which come out with every result of the tile. All but `valid`, `mode`
    and `first` matter in the last step only.
    """
    return data.StructLayout(
        {
            "valid": 1,
            "mode": Mode,
            "first": 1,
            "last": 1,
            "tokens": config.token_bits,
            "half": 1,
            "tag": tag,
        }
    )


def array_modules(config: EngineConfig) -> dict[str, wiring.Component]:
    """The units that the array instantiates, by the name of their Verilog module."""
    modules = {"speq_rounder": Rounder(config)}
    if config.draft_rows:
        modules["speq_exponent_remap"] = ExponentRemap(config)
        modules["speq_pe_dual"] = Pe(config, draft=True)
    if config.draft_rows < config.rows:
        modules["speq_pe_fp16"] = Pe(config, draft=False)
    return modules


class Array(wiring.Component):
    """R x C PEs: activations along rows, weights down columns, results out of the bottom.

    Formula: per tile and for each row r < tokens and column c, ``result[c] = round(sum over the
    tile's steps of the PE's term)``; one beat of C results for each row, in row order.

    Dataflow: a step enters row 0; weights move down one row per cycle, activations and control
    wait at their row's edge until the weights get there. A tile's sums are therefore finished
    one row per cycle, each is put on its column's bus in the one cycle in which it is complete,
    and no PE needs a second register to drain from while the next tile is under way. One
    rounder per column takes them from the bus.

    Flow control: none. A step is taken in every cycle; a step that is not `valid` is a bubble
    and changes nothing. The caller keeps `last` steps at least `tokens` cycles apart (the bus
    carries one row per cycle), which limits only tiles of fewer steps than tokens.

    Latency: the results of row r are at `results` `LATENCY` + r cycles after the tile's last
    step.

    Special values: a row whose activations include a non-finite one, and a column whose weights
    do, give NaN for the tile. One flag per row and one per column keep track of that.

    Parameters
    ----------
    config : EngineConfig
    tag : shape-castable
        Shape of the caller's tag.

    Members
    -------
    control : In(control_layout(config, tag))
    activations : In(config.activation_layout)
    weights : In(ArrayLayout(16, cols))
    groups : In(config.group_layout)
        Group bytes for these weights; only in builds with draft hardware.
    result_valid : Out(1)
    result_row : Out
        Row of the result.
    result_last : Out(1)
        It is the tile's last row.
    result_half : Out(1)
    result_tag : Out(tag)
    results : Out(ArrayLayout(32, cols))
        FP32, or FP16 zero-extended.
    """

    def __init__(self, config: EngineConfig, tag: object) -> None:
        self.config = config
        self.modules = array_modules(config)
        #: Cycles from a step to its sum in the accumulator of row 0.
        self._accumulated = max(u.LATENCY for u in self.modules.values() if isinstance(u, Pe))
        self.LATENCY = self._accumulated + Rounder.LATENCY
        members = {
            "control": In(control_layout(config, tag)),
            "activations": In(config.activation_layout),
            "weights": In(data.ArrayLayout(FP16_BITS, config.cols)),
            "result_valid": Out(1),
            "result_row": Out(config.row_bits),
            "result_last": Out(1),
            "result_half": Out(1),
            "result_tag": Out(tag),
            "results": Out(data.ArrayLayout(32, config.cols)),
        }
        if config.draft_rows:
            members["groups"] = In(config.group_layout)
        super().__init__(members)

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config, control = self.config, self.control
        columns = [self._decode_weight(m, column) for column in range(config.cols)]
        rows = [self._decode_activation(m, row) for row in range(config.rows)]
        weights: list[ValueLike] = [operand for operand, _ in columns]
        row_nonfinite = self._tile_flags(m, Cat(nonfinite for _, nonfinite in rows))
        column_nonfinite = self._tile_flags(m, Cat(nonfinite for _, nonfinite in columns))
        active, row_index, half = self._drain_sequence(m)

        first = _DelayLine(m, control.valid & control.first)
        # Also in a bubble, since it must fit the weight operand for 0 activations to give 0.
        draft = _DelayLine(m, control.mode == Mode.DRAFT)
        sums: list[list[Value]] = [[] for _ in range(config.cols)]
        for row, (activation, _) in enumerate(rows):
            module = self._pe_module(row)
            pe = self.modules[module]
            # Sums of shorter pipelines wait before, not behind, where there is less to hold.
            lag = self._accumulated - pe.LATENCY
            if row and row == config.draft_rows:
                weights = [_fp16_operand(m, weight, lag) for weight in weights]
            waiting = data.View(activation.shape(), _DelayLine(m, activation)[row + lag])
            factors = multiples(m, config, waiting, f"multiples_{row}")
            operand = data.View(factors.shape(), _DelayLine(m, factors)[1])
            drain = active & (row_index == row)
            for column in range(config.cols):
                unit = Unit(module, pe, flat=True)
                m.submodules[f"pe_{row}_{column}"] = unit
                m.d.comb += [
                    unit.weight_in.eq(weights[column]),
                    unit.activation.eq(operand),
                    unit.first.eq(first[row + self._accumulated - 1]),
                    unit.drain.eq(drain),
                ]
                if pe.has_draft:
                    m.d.comb += unit.draft.eq(Cat(draft[row + 1], draft[row + 2]))
                weights[column] = unit.weight_out
                sums[column].append(unit.drain_out)

        for column, drained in enumerate(sums):
            rounder = Unit("speq_rounder", self.modules["speq_rounder"])
            m.submodules[f"rounder_{column}"] = rounder
            m.d.comb += [
                rounder.sum.eq(any_of(drained)),
                rounder.nan.eq(row_nonfinite.bit_select(row_index, 1) | column_nonfinite[column]),
                rounder.half.eq(half),
                self.results[column].eq(rounder.result),
            ]
        return m

    def _pe_module(self, row: int) -> str:
        return "speq_pe_dual" if row < self.config.draft_rows else "speq_pe_fp16"

    def _decode_weight(self, m: Module, column: int) -> tuple[Value, Value]:
        """Row 0's operand from a column's word, and whether it is not finite."""
        word, mode = self.weights[column], self.control.mode
        name = f"weight_{column}"
        if not self.config.draft_rows:
            fp16 = data.View(_FP16, word)
            operand = Signal(weight_layout(draft=False), name=name)
            m.d.comb += _assign_fp16_weight(operand, fp16)
            return operand, _is_nonfinite(fp16)

        remap = Unit("speq_exponent_remap", self.modules["speq_exponent_remap"], clocked=False)
        m.submodules[f"exponent_remap_{column}"] = remap
        group = self.groups[column]
        m.d.comb += [remap.word.eq(word), remap.base.eq(group.base)]
        fp16 = data.View(_FP16, Mux(mode == Mode.BYPASS, word, remap.fp16))
        operand = Signal(weight_layout(draft=True), name=name)
        nibbles = [word.word_select(i, _NIBBLE_BITS) for i in range(DRAFT_LANES)]
        signs = [nibble[-1] for nibble in nibbles]
        with m.If(mode == Mode.DRAFT):
            m.d.comb += [
                operand.codes.eq(Cat(nibble[:-1] for nibble in nibbles)),
                *_assign_signs(operand, signs),
                operand.exponent.eq(group.base),
            ]
        with m.Else():
            m.d.comb += _assign_fp16_weight(operand, fp16)
        m.d.comb += operand.scale.eq(group.scale)
        return operand, Mux(mode == Mode.DRAFT, group.base == NONFINITE_BASE, _is_nonfinite(fp16))

    def _decode_activation(self, m: Module, row: int) -> tuple[Value, Value]:
        """A row's operand, 0 in a bubble, and whether it is not finite."""
        control = self.control
        can_draft = row < self.config.draft_rows
        fp16 = data.View(_FP16, self.activations.verify[row])
        operand = Signal(activation_layout(draft=can_draft), name=f"activation_{row}")
        is_draft = control.mode == Mode.DRAFT
        nonfinite = ~is_draft & _is_nonfinite(fp16)
        with m.If(control.valid & ~is_draft):
            m.d.comb += [
                operand.significand.eq(_significand(fp16)),
                *_assign_exponent(operand, fp16),
            ]
        if can_draft:
            block = self.activations.draft[row]
            lanes = list(block.lanes)
            nonfinite |= is_draft & (block.exponent == _NONFINITE_EXPONENT)
            with m.If(control.valid & is_draft):
                m.d.comb += [
                    operand.magnitudes.eq(Cat(lane.magnitude for lane in lanes)),
                    *_assign_signs(operand, [lane.negative for lane in lanes]),
                    operand.exponent.eq(block.exponent - 1),
                ]
        return operand, nonfinite

    def _drain_sequence(self, m: Module) -> tuple[Value, Value, Value]:
        """Walk through the rows of each finished tile and announce its results.

        Returns whether a row's sums are on the buses, which row's, and the tile's `half`.
        """
        control = self.control
        # With a reset: after a short one no tile from before may end.
        ended = _DelayLine(m, control.valid & control.last, reset=True)[self._accumulated - 1]
        details = Cat(control.tokens, control.half, control.tag)
        details_now = _DelayLine(m, details)[self._accumulated - 1]
        active = Signal()
        row = Signal(self.config.row_bits)
        tokens = Signal(self.config.token_bits, reset_less=True)
        half = Signal(reset_less=True)
        tag = Signal.like(self.result_tag, reset_less=True)
        is_last = row + 1 == tokens
        with m.If(ended):
            m.d.sync += [Cat(tokens, half, tag).eq(details_now), active.eq(1), row.eq(0)]
        with m.Else():
            m.d.sync += [row.eq(row + 1), active.eq(active & ~is_last)]
        announced = Cat(self.result_row, self.result_last, self.result_half, self.result_tag)
        m.d.comb += [
            self.result_valid.eq(_DelayLine(m, active, reset=True)[Rounder.LATENCY]),
            announced.eq(_DelayLine(m, Cat(row, is_last, half, tag))[Rounder.LATENCY]),
        ]
        return active, row, half

    def _tile_flags(self, m: Module, flags: Value) -> Value:
        """Per tile, the OR of each flag over the tile's steps, while its sums are drained."""
        control = self.control
        seen = Signal(len(flags), reset_less=True)
        with m.If(control.valid):
            m.d.sync += seen.eq(Mux(control.first, 0, seen) | flags)
        at_end = _DelayLine(m, seen)[self._accumulated - 2]
        held = Signal(len(flags), reset_less=True)
        with m.If(_DelayLine(m, control.valid & control.last)[self._accumulated - 1]):
            m.d.sync += held.eq(at_end)
        return held


class _DelayLine:
    """`line[n]` is the value n cycles ago."""

    def __init__(self, m: Module, value: Value, *, reset: bool = False) -> None:
        self._m = m
        self._taps = [Value.cast(value)]
        self._reset_less = not reset

    def __getitem__(self, delay: int) -> Value:
        while len(self._taps) <= delay:
            register = Signal(len(self._taps[0]), reset_less=self._reset_less)
            self._m.d.sync += register.eq(self._taps[-1])
            self._taps.append(register)
        return self._taps[delay]


def _is_nonfinite(fp16: data.View) -> Value:
    return fp16.exponent == _NONFINITE_EXPONENT


def _significand(fp16: data.View) -> Value:
    return Cat(fp16.mantissa, fp16.exponent != 0)


def _assign_exponent(operand: data.View, fp16: data.View) -> list:
    """Take exponent and sign of an FP16 number into an operand's fields."""
    return [
        operand.exponent.eq(Mux(fp16.exponent != 0, fp16.exponent - 1, 0)),
        operand.negative.eq(fp16.negative),
    ]


def _assign_fp16_weight(operand: data.View, fp16: data.View) -> list:
    """Take an FP16 number apart into a weight operand's fields."""
    codes, invert = significand_digits(_significand(fp16))
    return [
        operand.codes.eq(codes),
        operand.invert.eq(invert),
        *_assign_exponent(operand, fp16),
    ]


def _assign_signs(operand: data.View, signs: list[Value]) -> list:
    """The lanes' signs: the last one's, and which of the others differ from it."""
    return [
        operand.negative.eq(signs[-1]),
        operand.invert.eq(Cat(sign ^ signs[-1] for sign in signs[:-1])),
    ]


def _fp16_operand(m: Module, weight: ValueLike, lag: int) -> Value:
    """What an FP16-only PE takes of a dual-mode PE's operand, `lag` cycles later."""
    return _DelayLine(m, Value.cast(weight)[: weight_layout(draft=False).size])[lag]
