# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the vector unit: words of operands in, words of results out."""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import any_of, delayed, pipeline_stage
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.common.unit import Unit
from speq.hw.control.descriptor import VectorOperation
from speq.hw.vector.attention_mask import AttentionMask
from speq.hw.vector.command import (
    DETAIL_BITS,
    TWICE,
    result_word_layout,
    rows_layout,
    segment_bits,
    shape_layout,
)
from speq.hw.vector.fp32_to_fp16 import Fp32ToFp16
from speq.hw.vector.lane import (
    LATENCIES,
    PACES,
    SHARING,
    Lane,
    LaneOperation,
    SharedSigmoid,
)
from speq.hw.vector.partial_sums import PARTIAL_SUMS, PartialSums, slot_bits
from speq.hw.vector.row_values import RowValues
from speq.hw.vector.sigmoid import Exponential
from speq.hw.vector.word_counter import WordCounter, words_per_row

#: Results that wait to be taken: more than are on the way, so that there is one per cycle.
_RESULTS = 32
_ONE = 0x3F800000

#: Cycles from taking a word to its operands at the lanes.
_ISSUE = 2
#: The turn of the shared sigmoids in which a word of an operation is taken that does not take one
#: in every cycle: of GATE the next one is the first lane's when its part is there.
_TURN = -(_ISSUE + 1 + Exponential.LATENCY) % SHARING
#: From taking a word to reading the partial sum that it is added to, which is needed late.
_READ_PARTIAL = _ISSUE + Lane.B_DELAY - 1
#: From taking a word to taking one that finds the new partial sum at once.
_ADDED = _ISSUE + LATENCIES[LaneOperation.ADD_SCALED] + 1
#: From taking a word to taking the next one that is added to the same partial sum.
RECURRENCE = _ADDED - _READ_PARTIAL
#: From taking a word to taking one of any other operation.
_PAUSE = _ISSUE + max(LATENCIES.values()) + 1


class _Phase(enum.Enum, shape=unsigned(2)):
    """What is done with a segment."""

    #: The first sweep, or the only one.
    FIRST = 0
    #: Of NORM: the partial sums are added up.
    ADD_UP = 1
    #: Of NORM: the sum becomes the factor of the row.
    SCALE = 2
    #: The second sweep.
    SECOND = 3


class _A(enum.Enum, shape=unsigned(3)):
    """What a lane's operand `a` is."""

    CONSTANT = 0
    Y = 1
    X = 2
    ROW = 3
    #: An element of y of the lane's pair: the second one, then the first one.
    PAIR = 4


class _B(enum.Enum, shape=unsigned(3)):
    """What a lane's operand `b` is."""

    CONSTANT = 0
    Y = 1
    ROW = 2
    #: The partial sum that the word is added to.
    PARTIAL = 3
    #: The other partial sum.
    OTHER = 4


@dataclass(frozen=True)
class _Setting:
    """How an operation uses the lanes in a phase.

    Attributes
    ----------
    operation : LaneOperation
    a, b : what these operands are
    one : the constant a is 1, otherwise the command's argument
    takes_y : words of y are taken
    """

    operation: LaneOperation
    a: _A = _A.CONSTANT
    b: _B = _B.CONSTANT
    one: bool = False
    takes_y: bool = False


_SETTINGS = {
    (VectorOperation.EMBED, _Phase.FIRST): _Setting(LaneOperation.SCALE),
    (VectorOperation.ADD, _Phase.FIRST): _Setting(LaneOperation.ADD_SCALED, b=_B.Y, takes_y=True),
    (VectorOperation.MULTIPLY, _Phase.FIRST): _Setting(
        LaneOperation.SCALE_TWICE, _A.Y, takes_y=True
    ),
    (VectorOperation.NORM, _Phase.FIRST): _Setting(LaneOperation.ADD_SCALED, _A.X, _B.PARTIAL),
    (VectorOperation.NORM, _Phase.ADD_UP): _Setting(LaneOperation.ADD_SCALED, b=_B.OTHER, one=True),
    (VectorOperation.NORM, _Phase.SCALE): _Setting(LaneOperation.ADD_SCALED),
    (VectorOperation.NORM, _Phase.SECOND): _Setting(
        LaneOperation.SCALE_TWICE, _A.ROW, _B.Y, takes_y=True
    ),
    (VectorOperation.ROTATE, _Phase.FIRST): _Setting(LaneOperation.ROTATE, _A.PAIR, takes_y=True),
    (VectorOperation.ROUND, _Phase.FIRST): _Setting(LaneOperation.SCALE, one=True),
    (VectorOperation.GATE, _Phase.FIRST): _Setting(LaneOperation.GATE, _A.Y, takes_y=True),
    (VectorOperation.SIGMOID_GATE, _Phase.FIRST): _Setting(
        LaneOperation.GATE, one=True, takes_y=True
    ),
    (VectorOperation.SOFTMAX, _Phase.FIRST): _Setting(LaneOperation.SCALE),
    (VectorOperation.SOFTMAX, _Phase.SECOND): _Setting(LaneOperation.EXPONENTIAL, b=_B.ROW),
    (VectorOperation.NORMALIZE, _Phase.FIRST): _Setting(LaneOperation.SCALE, _A.ROW),
}
#: The operations that have a second operand.
BINARY = tuple(dict.fromkeys(each for (each, _), s in _SETTINGS.items() if s.takes_y))


def core_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What a `VectorCore` computes: the members of `vector_command_layout` that it needs, and the
    shape. NORM: `words.last_rows` are `words.rows`."""
    engine = config.engine
    return data.StructLayout(
        {
            "operation": VectorOperation,
            "words": shape_layout(config),
            "argument": 32,
            "detail": DETAIL_BITS,
            "o": segment_bits(config),
            "rows": engine.token_bits,
            "position": engine.k_bits,
        }
    )


def _tag_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What goes with a word through the lanes."""
    return data.StructLayout(
        {
            "row": config.engine.row_bits,
            # Which of the partial sums it is added to, as a word of these, and whether it is the
            # first one there.
            "slot": slot_bits(config),
            "is_fresh": 1,
            # Whether the word is its row's first or last.
            "begins": 1,
            "ends": 1,
        }
    )


class VectorCore(wiring.Component):
    """The operations of VECTOR descriptors but QUANTIZE on words of `lanes` elements, bit for bit
    as `speq.model.vector_ops`.

    `x`, `y` and `results` have the words in the order of `shape_layout`. NORM and SOFTMAX take each
    segment of x twice, and there are results, and words of y, for the second time only. Words of y
    are taken by the operations in `BINARY`. Rows are as long as their
    tiles; of NORM what follows the row's elements must be 0.

    SOFTMAX keeps the reciprocals of the sums of row r of segment s as those of (o + s, r), for
    NORMALIZE with the same o.

    Flow control: all streams may stall in any cycle. A command is taken when the results of the one
    before are on their way. A word in and a word out per cycle, but for MULTIPLY, ROTATE and the
    second sweep of a NORM, which take one in two cycles, GATE and SIGMOID_GATE, which take one in
    `SHARING`, and the first sweep of a NORM: with few rows and many lanes it takes
    rows * 64 / lanes words (64 / lanes if a tile has more than 64 columns) in `RECURRENCE` cycles.
    Between two sweeps are 10 to 40 cycles; those of a NORM have about 14 cycles for each halving of
    the 64 partial sums, and one for each row and addition of words, between them.

    To drop everything, reset it.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    command : In(stream of core_command_layout(config))
    rows : In(rows_layout(config))
        Of the pass; during SOFTMAX, from the cycle after its command was taken on.
    x, y : In(stream of ArrayLayout(32, lanes))
    results : Out(stream of result_word_layout(config))
    busy : Out(1)
        A command, or results that have not been taken.
    waits : Out(1)
        An operand is missing, and nothing else.

    Raises
    ------
    ValueError
        If there are no lanes.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._words = words_per_row(config)
        self._kept = kept = RowValues(config)
        #: Cycles from taking a word to taking one that finds what is kept because of it: the factor
        #: of a NORM's row, the largest score and the reciprocal of a SOFTMAX's.
        self._scaled = _ADDED + kept.factor_latency
        self._scored = _ISSUE + LATENCIES[LaneOperation.SCALE] + 1 + kept.maximum_latency
        exponential = LATENCIES[LaneOperation.EXPONENTIAL]
        self._weighted = _ISSUE + exponential + 1 + kept.reciprocal_latency
        #: Units that are instantiated, by the names of their Verilog modules.
        self.modules: dict[str, wiring.Component] = {
            "speq_lane": Lane(),
            "speq_shared_sigmoid": SharedSigmoid(),
            "speq_fp32_to_fp16": Fp32ToFp16(),
        }
        words = data.ArrayLayout(32, config.lanes)
        super().__init__(
            {
                "command": In(stream.Signature(core_command_layout(config))),
                "rows": In(rows_layout(config)),
                "x": In(stream.Signature(words)),
                "y": In(stream.Signature(words)),
                "results": Out(stream.Signature(result_word_layout(config))),
                "busy": Out(1),
                "waits": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config, engine = self.config, self.config.engine
        m.submodules.counter = counter = WordCounter(config)
        m.submodules.mask = mask = AttentionMask(config)
        m.submodules.sums = sums = PartialSums(config, _READ_PARTIAL - 1, _ADDED, self._scaled)
        m.submodules.kept = kept = self._kept

        # The command.
        given = self.command.payload
        operation = Signal(VectorOperation, init=VectorOperation.ROUND, reset_less=True)
        argument = Signal(32, reset_less=True)
        detail = Signal(32, reset_less=True)
        last_pass_row = Signal(engine.row_bits, reset_less=True)
        twice = Signal(reset_less=True)
        is_norm = Signal(reset_less=True)
        is_softmax = Signal(reset_less=True)
        goes_twice = any_of([given.operation == each for each in TWICE])
        takes = self.command.valid & self.command.ready
        m.d.comb += [
            counter.start.eq(takes),
            counter.shape.eq(given.words),
            counter.twice.eq(goes_twice),
            mask.start.eq(takes & (given.operation == VectorOperation.SOFTMAX)),
            mask.count.eq(given.rows),
            mask.position.eq(given.position),
            mask.window.eq(given.detail),
            mask.rows.eq(self.rows),
            kept.is_norm.eq(is_norm),
            kept.reads_reciprocal.eq(operation == VectorOperation.NORMALIZE),
        ]
        with m.If(takes):
            m.d.sync += [
                operation.eq(given.operation),
                argument.eq(given.argument),
                detail.eq(given.detail),
                sums.tiles.eq(given.words.tiles),
                sums.last_row.eq(given.words.last_rows - 1),
                last_pass_row.eq(given.rows - 1),
                twice.eq(goes_twice),
                is_norm.eq(given.operation == VectorOperation.NORM),
                is_softmax.eq(given.operation == VectorOperation.SOFTMAX),
            ]

        # A sweep after the other, each when nothing of it can meet what is left of the one before.
        place = counter.place
        issue = Signal()
        running = Signal()
        second = Signal(reset_less=True)
        finished = Signal(reset_less=True)
        is_drained = Signal()
        timer = Signal(range(max(_PAUSE, self._scored, self._weighted)), reset_less=True)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.command.ready.eq(1)
                m.d.sync += second.eq(0)
                with m.If(self.command.valid):
                    m.next = "SET"
            with m.State("SET"):
                with m.If(~mask.busy):
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += running.eq(counter.active)
                of_softmax = Mux(second, self._weighted, self._scored)
                of_others = Mux(is_norm & ~second, _ADDED, _PAUSE)
                m.d.sync += [
                    finished.eq(place.ends.operation),
                    timer.eq(Mux(is_softmax, of_softmax, of_others) - 2),
                ]
                with m.If(issue & Mux(twice, place.ends.sweep, place.ends.operation)):
                    m.next = "DRAIN"
            with m.State("DRAIN"):
                m.d.sync += timer.eq(timer - 1)
                with m.If(timer == 0):
                    m.d.comb += is_drained.eq(1)
                    with m.If(is_norm & ~second):
                        m.d.comb += sums.start.eq(1)
                        m.next = "ADD"
                    with m.Else():
                        m.d.sync += second.eq(twice & ~second)
                        m.next = "NEXT"
            with m.State("ADD"):
                with m.If(~sums.busy):
                    m.d.sync += second.eq(1)
                    m.next = "SET"
            with m.State("NEXT"):
                with m.If(finished):
                    m.next = "IDLE"
                with m.Else():
                    m.next = "RUN"
        phase = Signal(_Phase)
        m.d.comb += phase.eq(
            Mux(
                sums.busy,
                Mux(sums.scales, _Phase.SCALE, _Phase.ADD_UP),
                Mux(second, _Phase.SECOND, _Phase.FIRST),
            )
        )
        setting = self._setting(m, operation, phase, argument, detail)

        # A word is taken if there is room for its result, as the lanes do not stop.
        emits = ~twice | second
        room = Signal(range(_RESULTS + 1), init=_RESULTS)
        has_room = Signal(init=1)
        taken = Signal()
        next_room = (room - (issue & emits) + taken)[: len(room)]
        m.d.sync += [
            taken.eq(self.results.valid & self.results.ready),
            room.eq(next_room),
            has_room.eq(next_room != 0),
        ]
        adds = issue | sums.adds
        may_add = self._may_add(m, adds, is_norm & ~second, sums.last_row)
        turn = Signal(range(SHARING))
        m.d.sync += turn.eq(turn + 1)
        goes = running & has_room & may_add & self._has_turn(setting.operation, turn)
        m.d.comb += [
            self.x.ready.eq(goes & (self.y.valid | ~setting.takes_y)),
            self.y.ready.eq(goes & setting.takes_y & self.x.valid),
            issue.eq(self.x.ready & self.x.valid),
            counter.advance.eq(issue),
            self.waits.eq(goes & ~issue),
            self.busy.eq(~self.command.ready | (room != _RESULTS)),
        ]

        # Where the word is among the segments of which something is kept, and among the rows of the
        # pass, whose turn it is in the rows of an attention.
        segment = Signal(segment_bits(config), reset_less=True)
        pass_row = Signal(engine.row_bits, reset_less=True)
        first_pass_row = Signal(engine.row_bits, reset_less=True)
        next_pass_row = Mux(pass_row == last_pass_row, 0, pass_row + 1)
        with m.If(issue & place.ends.row):
            m.d.sync += pass_row.eq(
                Mux(place.ends.tile & ~place.ends.segment, first_pass_row, next_pass_row)
            )
            with m.If(place.ends.segment):
                m.d.sync += [first_pass_row.eq(next_pass_row), segment.eq(segment + 1)]
        with m.If(takes):
            m.d.sync += [pass_row.eq(0), first_pass_row.eq(0), segment.eq(given.o)]
        with m.If(issue):
            m.d.sync += kept.segment.eq(segment)
        index = Cat(place.word[: self._words.bit_length() - 1], place.tile)
        m.d.comb += [
            mask.row.eq(pass_row),
            mask.word.eq(index),
            kept.read_row.eq(place.row),
            kept.read_segment.eq(segment),
        ]

        # What goes with the word, by the cycles since it was taken.
        in_slot = (PARTIAL_SUMS // config.lanes).bit_length() - 1
        tag = Signal(_tag_layout(config))
        m.d.comb += [
            tag.row.eq(Mux(sums.busy, sums.row, place.row)),
            tag.slot.eq(Mux(sums.busy, sums.slot, index[:in_slot])),
            tag.is_fresh.eq(index[in_slot:] == 0),
            tag.begins.eq(index == 0),
            tag.ends.eq(place.last.tile & place.last.word),
        ]
        tags, valid = [tag], [adds]
        for cycle in range(1, _ISSUE + max(LATENCIES.values()) + 1):
            tags.append(Signal(tag.shape(), name=f"tag_{cycle}", reset_less=True))
            valid.append(Signal(name=f"valid_{cycle}"))
            # A word behind its result is none of the next sweep, whose results come later.
            m.d.sync += [
                tags[cycle].eq(tags[cycle - 1]),
                valid[cycle].eq(valid[cycle - 1] & ~is_drained),
            ]

        results = self._lanes(m, setting, sums, tags, issue, turn)
        is_partial = is_norm & ((phase == _Phase.FIRST) | (phase == _Phase.ADD_UP))
        m.d.comb += [
            sums.write_enable.eq(valid[_ADDED - 1] & is_partial),
            sums.write_row.eq(tags[_ADDED - 1].row),
            sums.write_slot.eq(tags[_ADDED - 1].slot),
            sums.write_data.eq(Cat(results)),
        ]

        # Words of results, 0 for entries that are not seen.
        seen = [mask.seen]
        for _ in range(_ISSUE + max(LATENCIES.values()) - AttentionMask.LATENCY):
            seen.append(delayed(m, seen[-1], 1))
        result_tag = Signal(tag.shape())
        has_result = Signal()
        is_seen = Signal(config.lanes)
        with m.Switch(setting.operation):
            for each, latency in LATENCIES.items():
                cycle = _ISSUE + latency
                with m.Case(each):
                    m.d.comb += [
                        result_tag.eq(tags[cycle]),
                        has_result.eq(valid[cycle]),
                        is_seen.eq(seen[cycle - AttentionMask.LATENCY]),
                    ]
        shows = is_seen | (~is_softmax).replicate(config.lanes)
        numbers = pipeline_stage(
            m,
            _ISSUE + 1,
            **{f"result_{i}": result & shows[i].replicate(32) for i, result in enumerate(results)},
        )
        m.d.comb += kept.numbers.eq(Cat(numbers))
        m.d.sync += [
            kept.counts.eq(is_seen),
            kept.row.eq(result_tag.row),
            kept.begins.eq(result_tag.begins),
            kept.ends.eq(result_tag.ends),
            kept.is_score.eq(has_result & is_softmax & ~second),
            kept.is_weight.eq(has_result & is_softmax & second),
            kept.is_sum.eq(has_result & (phase == _Phase.SCALE)),
        ]
        self._results(m, kept, has_result & emits)
        return m

    def _lanes(
        self,
        m: Module,
        setting: data.View,
        sums: PartialSums,
        tags: list[Signal],
        issue: Value,
        turn: Value,
    ) -> list[Value]:
        """The lanes and their operands; the results."""
        lanes = self.config.lanes
        x, y = (
            [pipeline_stage(m, 1, **{f"{name}_{i}": word[i]})[0] for i in range(lanes)]
            for name, word in (("x", self.x.payload), ("y", self.y.payload))
        )
        early_x, early_y = x, y
        # They stay until the next word, as GATE needs them for some cycles.
        x, y = (
            [Signal(32, name=f"{name}_{i}_2", reset_less=True) for i in range(lanes)]
            for name in "xy"
        )
        was_issued = delayed(m, issue, 1)
        for i in range(lanes):
            with m.If(sums.busy):
                m.d.sync += x[i].eq(sums.first[i])
            with m.Elif(was_issued):
                m.d.sync += x[i].eq(early_x[i])
            with m.If(was_issued):
                m.d.sync += y[i].eq(early_y[i])
        # A word's operands are at the lanes in phase 0. Those of ROTATE are first the other element
        # of the pair and its factor.
        phase = Signal(range(SHARING))
        m.d.comb += phase.eq(turn - (_TURN + _ISSUE))
        others = Signal()
        m.d.comb += others.eq(setting.rotates & ~phase[0])
        sigmoids = []
        for i in range(lanes // SHARING):
            unit = Unit("speq_shared_sigmoid", self.modules["speq_shared_sigmoid"])
            m.submodules[f"sigmoid_{i}"] = unit
            m.d.comb += unit.turn.eq(turn)
            sigmoids.append(unit)
        row_value = self._kept.value
        late = _READ_PARTIAL - 2
        late_row_value = delayed(m, row_value, late)
        m.d.comb += [
            sums.read_row.eq(tags[_READ_PARTIAL].row),
            sums.read_slot.eq(tags[_READ_PARTIAL].slot),
        ]
        # With what comes from the RAM there is no time for a choice.
        takes_partial = Signal()
        m.d.sync += takes_partial.eq((setting.b == _B.PARTIAL) & ~tags[_READ_PARTIAL].is_fresh)
        results = []
        for i in range(lanes):
            m.submodules[f"lane_{i}"] = lane = Unit("speq_lane", self.modules["speq_lane"])
            sigmoid = sigmoids[i // SHARING]
            a = Signal(32, name=f"a_{i}")
            with m.Switch(setting.a):
                with m.Case(_A.CONSTANT):
                    m.d.comb += a.eq(setting.a_constant)
                with m.Case(_A.X):
                    m.d.comb += a.eq(x[i])
                with m.Case(_A.Y):
                    m.d.comb += a.eq(y[i])
                with m.Case(_A.ROW):
                    m.d.comb += a.eq(row_value)
                with m.Case(_A.PAIR):
                    m.d.comb += a.eq(Mux(others, y[i | 1], y[i & ~1]))
            b = Signal(32, name=f"b_{i}", reset_less=True)
            late_y = delayed(m, y[i], late)
            with m.Switch(setting.b):
                with m.Case(_B.Y):
                    m.d.sync += b.eq(late_y)
                with m.Case(_B.ROW):
                    m.d.sync += b.eq(late_row_value)
                with m.Case(_B.OTHER):
                    m.d.sync += b.eq(sums.other[i])
                with m.Case(_B.PARTIAL):
                    m.d.sync += b.eq(0)
                with m.Default():
                    m.d.sync += b.eq(setting.b_constant)
            partial = sums.partial[i] & takes_partial.replicate(32)
            m.d.comb += [
                lane.x.eq(Mux(others, x[i ^ 1], x[i])),
                lane.a.eq(a),
                lane.y.eq(Mux(setting.a == _A.Y, x[i], y[i])),
                lane.phase.eq(phase),
                lane.b.eq(b | partial),
                sigmoid.parts[i % SHARING].eq(lane.part),
                lane.sigmoid.eq(sigmoid.sigmoid),
                lane.takes_sigmoid.eq(sigmoid.takes[i % SHARING]),
                lane.operation.eq(setting.operation),
                lane.subtract.eq(i % 2 == 0),
            ]
            results.append(lane.result)
        return results

    def _has_turn(self, operation: Value, turn: Value) -> Value:
        """Whether the lanes take operands when those of a word that is taken now are there."""
        paces = {pace: [each for each in PACES if PACES[each] == pace] for pace in PACES.values()}
        return any_of(
            [
                any_of([operation == each for each in operations]) & (turn % pace == _TURN % pace)
                for pace, operations in paces.items()
            ]
        )

    def _results(self, m: Module, kept: RowValues, emits: Value) -> None:
        """Results in both forms to where they wait; `emits` is a cycle ahead of the numbers."""
        m.submodules.fifo = fifo = RamFifo(result_word_layout(self.config).size, _RESULTS)
        word = data.View(result_word_layout(self.config), fifo.write.payload)
        for i, number in enumerate(kept.numbers):
            unit = Unit("speq_fp32_to_fp16", self.modules["speq_fp32_to_fp16"])
            m.submodules[f"fp32_to_fp16_{i}"] = unit
            m.d.comb += [
                unit.fp32.eq(number),
                word.fp32[i].eq(delayed(m, number, Fp32ToFp16.LATENCY)),
                word.fp16[i].eq(unit.fp16),
                kept.weights[i].eq(unit.fp16),
            ]
        for i in range(1 + Fp32ToFp16.LATENCY):
            emits, following = Signal(name=f"emits_{i}"), emits
            m.d.sync += emits.eq(following)
        m.d.comb += fifo.write.valid.eq(emits)
        wiring.connect(m, fifo.read, wiring.flipped(self.results))

    def _setting(
        self, m: Module, operation: Value, phase: Value, argument: Value, detail: Value
    ) -> data.View:
        """How the lanes are used, a cycle later than operation and phase."""
        layout = data.StructLayout(
            {
                "operation": LaneOperation,
                "a": _A,
                "b": _B,
                "takes_y": 1,
                "rotates": 1,
                "a_constant": 32,
                "b_constant": 32,
            }
        )
        setting = Signal(layout, reset_less=True)
        one = Signal()
        with m.Switch(Cat(operation, phase)):
            for (case, part), chosen in _SETTINGS.items():
                with m.Case(case.value | part.value << len(Value.cast(operation))):
                    m.d.comb += one.eq(chosen.one)
                    m.d.sync += [
                        setting.operation.eq(chosen.operation),
                        setting.a.eq(chosen.a),
                        setting.b.eq(chosen.b),
                        setting.takes_y.eq(chosen.takes_y),
                        setting.rotates.eq(chosen.operation == LaneOperation.ROTATE),
                    ]
        m.d.sync += [
            setting.a_constant.eq(Mux(one, _ONE, argument)),
            setting.b_constant.eq(Mux(phase == _Phase.SCALE, detail, argument)),
        ]
        return setting

    def _may_add(self, m: Module, taken: Value, counts: Value, last_row: Value) -> Value:
        """Whether the partial sum that the next word is added to can be read in time: fewer words
        are on their way than lie between two of one partial sum."""
        slots = PARTIAL_SUMS // self.config.lanes
        if slots >= RECURRENCE:
            return Const(1)
        bits = RECURRENCE.bit_length()
        # In a tile of more columns a row comes back to its first partial sum within the tile.
        distance = Signal(bits, reset_less=True)
        if self.config.engine.cols > PARTIAL_SUMS:
            m.d.comb += distance.eq(slots)
        else:
            enough = -(-RECURRENCE // slots) - 1
            m.d.sync += distance.eq(Mux(last_row >= enough, RECURRENCE, (last_row + 1) * slots))
        on_way = Signal(bits)
        may_add = Signal(init=1)
        history = [taken]
        for i in range(1, RECURRENCE):
            history.append(Signal(name=f"taken_{i}"))
            m.d.sync += history[i].eq(history[i - 1])
        next_on_way = (on_way + taken - history[-1])[:bits]
        m.d.sync += [on_way.eq(next_on_way), may_add.eq((next_on_way < distance) | ~counts)]
        return may_add
