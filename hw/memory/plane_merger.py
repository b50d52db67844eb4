# SPDX-License-Identifier: Apache-2.0
"""Draft and residual plane of an encoded tensor, joined to weight words."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.engine_config import DRAFT_LANES, FP16_BITS, EngineConfig

_NIBBLE_BITS = FP16_BITS // DRAFT_LANES
_RESIDUAL_BITS = FP16_BITS - _NIBBLE_BITS
_LAST_STEP = DRAFT_LANES - 1


def merger_command_layout(config: EngineConfig) -> data.StructLayout:
    """One tile: `words` words (1 or more), of both planes if `merge`, else of the draft plane."""
    return data.StructLayout({"words": config.k_bits, "merge": 1})


class PlaneMerger(wiring.Component):
    """For each command, its weight words, from words of one plane or of both.

    With `merge`, four weights come from one draft word, whose nibbles are their bits 15..12, and
    three residual words, whose 48 bits are their bits 11..0, the first weight's in the low bits
    (`speq.model.format`). The last four may be fewer: then their planes' words are taken and the
    padding is dropped. Without `merge` the words of the draft plane pass unchanged.

    Flow control: all streams may stall in any cycle. A word is offered in the cycle in which what
    it is made of is. Without stalls there is one word per cycle, also from command to command,
    except that dropping two or three weights of padding takes a cycle or two: as many as the
    planes' words need to pass a port of the array's width.

    Parameters
    ----------
    config : EngineConfig

    Members
    -------
    command : In(stream of merger_command_layout(config))
    draft, residual : In(stream of ArrayLayout(16, cols))
    words : Out(stream of ArrayLayout(16, cols))
    busy : Out(1)
        A command has not been finished.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        words = stream.Signature(data.ArrayLayout(FP16_BITS, config.cols))
        super().__init__(
            {
                "command": In(stream.Signature(merger_command_layout(config))),
                "draft": In(words),
                "residual": In(words),
                "words": Out(words),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        command = self.command.payload
        # What streams in and out depends on these alone, not on counters: a long path leads on to
        # the FIFOs of both planes.
        is_word = Signal()
        is_padding = Signal()  # that is dropped
        merge = Signal(reset_less=True)
        needs_residual = Signal()
        takes_draft = Signal(reset_less=True)  # the last weight from this draft word
        is_end = Signal(reset_less=True)  # the tile's last weight, without padding behind it

        left = Signal(self.config.k_bits, reset_less=True)  # weights
        step = Signal(range(DRAFT_LANES))  # weight within the four
        last = left == 1
        second_last = left == 2
        is_second, is_third = step == _LAST_STEP - 2, step == _LAST_STEP - 1
        give = Signal()
        drop = Signal()
        finish = Signal()
        m.d.comb += [
            self.words.valid.eq(
                is_word & self.draft.valid & (~needs_residual | self.residual.valid)
            ),
            give.eq(self.words.valid & self.words.ready),
            drop.eq(is_padding & self.residual.valid),
            self.draft.ready.eq(give & takes_draft),
            self.residual.ready.eq((needs_residual & give) | is_padding),
            finish.eq((give & is_end) | (drop & is_third)),
            self.busy.eq(is_word | is_padding),
            self.command.ready.eq(~self.busy | finish),
        ]
        # Each residual word completes one weight; the last weight has all its bits by then.
        with m.If(give):
            m.d.sync += left.eq(left - 1)
            with m.If(last):
                m.d.sync += [is_word.eq(0), is_padding.eq(1)]
        with m.If(give | drop):
            m.d.sync += [
                step.eq(step + 1),
                needs_residual.eq(merge & ~is_third),
                takes_draft.eq(~merge | second_last | is_third),
                is_end.eq(second_last & (~merge | is_second | is_third)),
            ]
        with m.If(finish):
            m.d.sync += [is_word.eq(0), is_padding.eq(0), step.eq(0)]
        with m.If(self.command.valid & self.command.ready):
            is_single = command.words == 1
            m.d.sync += [
                is_word.eq(1),
                left.eq(command.words),
                merge.eq(command.merge),
                step.eq(0),
                needs_residual.eq(command.merge),
                takes_draft.eq(~command.merge | is_single),
                is_end.eq(~command.merge & is_single),
            ]

        for column in range(self.config.cols):
            draft = self.draft.payload[column]
            joined = self._join(m, draft, self.residual.payload[column], step, give)
            m.d.comb += self.words.payload[column].eq(Mux(merge, joined, draft))
        return m

    def _join(self, m: Module, draft: Value, residual: Value, step: Signal, give: Signal) -> Value:
        """The weight word of a column; the residual's bits that are left over are kept."""
        kept = Signal(_RESIDUAL_BITS, reset_less=True)
        low = Signal(_RESIDUAL_BITS)
        with m.Switch(step):
            for i in range(DRAFT_LANES):
                before = i * _NIBBLE_BITS  # bits that are kept from the words before
                with m.Case(i):
                    m.d.comb += low.eq(Cat(kept[:before], residual[: _RESIDUAL_BITS - before]))
                    with m.If(give):
                        m.d.sync += kept.eq(residual[_RESIDUAL_BITS - before :])
        return Cat(low, draft.word_select(step, _NIBBLE_BITS))
