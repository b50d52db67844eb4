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
        active = Signal()
        merge = Signal(reset_less=True)
        left = Signal(self.config.k_bits, reset_less=True)  # weights; 0: padding is dropped
        step = Signal(range(DRAFT_LANES))  # weight within the four

        # Each residual word completes one weight; the last weight has all its bits by then.
        needs_residual = merge & (step != _LAST_STEP)
        last = left == 1
        is_word = active & (left != 0)
        give = Signal()
        finish = Signal()
        m.d.comb += [
            self.words.valid.eq(
                is_word & self.draft.valid & (~needs_residual | self.residual.valid)
            ),
            give.eq(self.words.valid & self.words.ready),
            self.draft.ready.eq(give & (~merge | last | (step == _LAST_STEP))),
            self.residual.ready.eq(active & needs_residual & Mux(left == 0, 1, give)),
            finish.eq(
                Mux(
                    left == 0,
                    active & self.residual.valid & (step == _LAST_STEP - 1),
                    give & last & (~merge | (step >= _LAST_STEP - 1)),
                )
            ),
            self.command.ready.eq(~active | finish),
            self.busy.eq(active),
        ]
        with m.If(give):
            m.d.sync += left.eq(left - 1)
        with m.If(give | (self.residual.valid & self.residual.ready)):
            m.d.sync += step.eq(step + 1)
        with m.If(finish):
            m.d.sync += [active.eq(0), step.eq(0)]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [active.eq(1), left.eq(command.words), merge.eq(command.merge), step.eq(0)]

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
