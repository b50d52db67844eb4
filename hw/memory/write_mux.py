# SPDX-License-Identifier: Apache-2.0
"""Several sources of writes share one writer of memory."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import decremented
from speq.hw.memory.axi import BEATS_BITS, AxiConfig
from speq.hw.memory.memory_writer import write_layout

#: Commands whose beats have not all been passed on.
_AHEAD = 4
#: Commands on offer, or held by a `MemoryWriter`, that are not waiting for a response yet.
_HELD = 3


def write_source_signature(config: AxiConfig) -> wiring.Signature:
    """Writes, as their source sees them: commands, their beats in the same order, and a pulse when
    the oldest command that is left has been carried out."""
    return wiring.Signature(
        {
            "command": Out(stream.Signature(config.command_layout)),
            "data": Out(stream.Signature(write_layout(config))),
            "done": In(1),
        }
    )


class WriteMux(wiring.Component):
    """Merge the commands and beats of several sources for one `MemoryWriter`.

    Commands are passed on whole, each with exactly its number of beats, round robin. Beats of a
    source are taken only behind their command; a source that offers a command and no beats holds
    up the others.

    Flow control: all streams may stall in any cycle. A command is offered one cycle after it was
    taken, its first beat in that cycle at the earliest and then in the cycle in which the source
    offers it; there is no gap between the beats of different commands. Up to four commands are
    taken before the beats of the first have been passed on. A command that the writer refuses or
    that fails gives no `done`; writer and mux must then be cleared together.

    Parameters
    ----------
    config : AxiConfig
    sources : int
        Number of sources, from 1.

    Members
    -------
    sources : In(write_source_signature(config)).array(sources)
    command : Out(stream of config.command_layout)
    data : Out(stream of write_layout(config))
    done_in : In(1)
        The writer's `done`.

    Raises
    ------
    ValueError
        If there are no sources.
    """

    #: Cycles from taking a command to offering it.
    LATENCY = 1

    def __init__(self, config: AxiConfig, sources: int) -> None:
        if sources < 1:
            raise ValueError(f"sources is {sources!r}; expected at least 1")
        self.config = config
        super().__init__(
            {
                "sources": In(write_source_signature(config)).array(sources),
                "command": Out(stream.Signature(config.command_layout)),
                "data": Out(stream.Signature(write_layout(config))),
                "done_in": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        count = len(self.sources)
        source_bits = max(1, (count - 1).bit_length())
        entry = data.StructLayout({"source": source_bits, "beats": BEATS_BITS})
        # Behind the one whose beats are passed on, which is in registers.
        m.submodules.passing = passing = SyncFIFO(width=entry.size, depth=_AHEAD - 1)
        m.submodules.unanswered = unanswered = SyncFIFO(
            width=source_bits, depth=self.config.outstanding + _HELD
        )

        # The first source with a command, counted from the one after the last that was chosen.
        chosen = Signal(source_bits)
        previous = Signal(source_bits)
        for last in range(count):
            with m.If(previous == last):
                for offset in reversed(range(1, count + 1)):
                    source = (last + offset) % count
                    with m.If(self.sources[source].command.valid):
                        m.d.comb += chosen.eq(source)
        may_take = Signal()
        take = Signal()
        command = Signal(self.config.command_layout)
        m.d.comb += [
            may_take.eq(
                (~self.command.valid | self.command.ready) & passing.w_rdy & unanswered.w_rdy
            ),
            take.eq(may_take & Cat(source.command.valid for source in self.sources).any()),
        ]
        for i, source in enumerate(self.sources):
            with m.If(chosen == i):
                m.d.comb += [
                    source.command.ready.eq(may_take & source.command.valid),
                    command.eq(source.command.payload),
                ]
        with m.If(take):
            m.d.sync += [
                previous.eq(chosen),
                self.command.valid.eq(1),
                self.command.payload.eq(command),
            ]
        with m.Elif(self.command.ready):
            m.d.sync += self.command.valid.eq(0)
        m.d.comb += [
            passing.w_data.eq(Cat(chosen, command.beats)),
            unanswered.w_data.eq(chosen),
            unanswered.w_en.eq(take),
            unanswered.r_en.eq(self.done_in),
        ]
        self._pass_beats(m, entry, passing, take)
        for i, source in enumerate(self.sources):
            m.d.comb += source.done.eq(self.done_in & (unanswered.r_data == i))
        return m

    def _pass_beats(
        self, m: Module, entry: data.StructLayout, passing: SyncFIFO, take: Signal
    ) -> None:
        """As many beats of the current command's source as it has."""
        current = Signal(entry, reset_less=True)  # `beats` that are left
        active = Signal()
        step = Signal()
        free = Signal()
        m.d.comb += [
            step.eq(self.data.valid & self.data.ready),
            free.eq(~active | (step & (current.beats == 1))),
            passing.r_en.eq(free),
            # If no other waits, a command need not either.
            passing.w_en.eq(take & (passing.r_rdy | ~free)),
        ]
        for i, source in enumerate(self.sources):
            with m.If(current.source == i):
                m.d.comb += [
                    self.data.payload.eq(source.data.payload),
                    self.data.valid.eq(source.data.valid & active),
                    source.data.ready.eq(self.data.ready & active),
                ]
        with m.If(free):
            m.d.sync += [
                active.eq(passing.r_rdy | take),
                current.eq(Mux(passing.r_rdy, passing.r_data, passing.w_data)),
            ]
        with m.Elif(step):
            m.d.sync += current.beats.eq(decremented(current.beats))
