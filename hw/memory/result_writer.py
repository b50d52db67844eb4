# SPDX-License-Identifier: Apache-2.0
"""Results of the array, packed into beats for memory."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.engine_config import FP16_BITS
from speq.hw.memory.memory_writer import write_layout

_FP32_BITS = 32
#: Commands that wait behind each of the two parts of the unit.
_QUEUE = 2


def result_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Where the results of a GEMM go: `tiles` times `tokens` result beats, from `address` upwards,
    as FP16 if `half`. With `discard` they are not written, with `rank` they are ranked."""
    engine = config.engine
    return data.StructLayout(
        {
            "tiles": (-(-engine.max_o // engine.cols)).bit_length(),
            "tokens": engine.token_bits,
            "half": 1,
            "discard": 1,
            "rank": 1,
            "address": config.address_bits,
        }
    )


class ResultWriter(wiring.Component):
    """Hand the results of GEMMs to a writer of memory, as [tile][token][column], and to a ranker.

    A result beat becomes 32 * cols / data_bits beats of the data port (FP16: half as many), the
    lowest columns first. Columns that are not strobed are written as 0. Each tile is one write
    command, offered when its first beat is there: other sources of a `WriteMux` would wait for
    beats that are not. The results' `last`, not the number of tiles, ends a command.

    Flow control: all streams may stall in any cycle. A result beat is taken with its last beat for
    memory, and when the ranker has taken it; without stalls there is a beat for memory in every
    cycle but one before each tile. Discarded results take one cycle. The outputs follow the results
    in the same cycle, behind a command by one cycle or more, beats behind their command. Three
    commands are taken before the first of them has finished; tiles and tokens must not be 0.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    command : In(stream of result_command_layout(config))
    results : In(stream of gemm_engine.result_layout(config.engine))
    ranked : Out(stream of gemm_engine.result_layout(config.engine))
        The result beats of commands with `rank`.
    write_command : Out(stream of config.data.command_layout)
    write_data : Out(stream of write_layout(config.data))
    done : Out(1)
        Pulse: a command's last result beat has been taken, and so have all its write commands.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        results = result_layout(config.engine)
        super().__init__(
            {
                "command": In(stream.Signature(result_command_layout(config))),
                "results": In(stream.Signature(results)),
                "ranked": Out(stream.Signature(results)),
                "write_command": Out(stream.Signature(config.data.command_layout)),
                "write_data": Out(stream.Signature(write_layout(config.data))),
                "done": Out(1),
            }
        )

    def _beats(self, bits: int) -> int:
        """Beats of the data port for one result beat with so many bits per column."""
        return self.config.engine.cols * bits // self.config.data.data_bits

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        layout = result_command_layout(self.config)
        m.submodules.places = places = SyncFIFO(width=layout.size, depth=_QUEUE)
        m.submodules.formats = formats = SyncFIFO(width=layout.size, depth=_QUEUE)
        command = self.command
        is_written = ~command.payload.discard
        m.d.comb += [
            command.ready.eq(places.w_rdy & formats.w_rdy),
            places.w_data.eq(command.payload),
            places.w_en.eq(command.valid & command.ready & is_written),
            formats.w_data.eq(command.payload),
            formats.w_en.eq(command.valid & command.ready),
        ]
        offered = Signal()  # the first beat of a tile whose command has not been taken
        self._place(m, places, offered)
        self._pass_on(m, formats, offered)
        return m

    def _place(self, m: Module, places: SyncFIFO, offered: Signal) -> None:
        """One write command per tile."""
        config = self.config
        layout = result_command_layout(config)
        job = Signal(layout, reset_less=True)
        running = Signal()
        last = Signal()
        step = Signal()
        beats = Signal(range(config.engine.rows * self._beats(_FP32_BITS) + 1))
        m.d.comb += [
            # The factor is one of two powers of two.
            beats.eq(
                Mux(
                    job.half,
                    job.tokens * self._beats(FP16_BITS),
                    job.tokens * self._beats(_FP32_BITS),
                )
            ),
            self.write_command.valid.eq(running & offered),
            self.write_command.payload.address.eq(job.address),
            self.write_command.payload.beats.eq(beats),
            step.eq(self.write_command.valid & self.write_command.ready),
            last.eq(job.tiles == 1),
            places.r_en.eq(~running | (step & last)),
        ]
        with m.If(step):
            m.d.sync += [
                job.tiles.eq(job.tiles - 1),
                job.address.eq(job.address + beats * config.data.beat_bytes),
            ]
        with m.If(places.r_en):
            m.d.sync += [running.eq(places.r_rdy), job.eq(places.r_data)]

    def _pass_on(self, m: Module, formats: SyncFIFO, offered: Signal) -> None:
        """Result beats to the ranker and, cut into beats, to the writer."""
        config = self.config
        results, ranked, write = self.results, self.ranked, self.write_data
        layout = result_command_layout(config)
        job = data.View(layout, formats.r_data)
        present = results.valid & formats.r_rdy
        asked = Signal()  # the command of the tile that this beat is of has been taken
        was_ranked = Signal()  # the ranker has this beat
        was_written = Signal()  # memory has this beat
        part = Signal(range(self._beats(_FP32_BITS)))
        last_part = Signal()
        ranked_all = Signal()
        written_all = Signal()
        taken = Signal()
        m.d.comb += [
            last_part.eq(
                part == Mux(job.half, self._beats(FP16_BITS) - 1, self._beats(_FP32_BITS) - 1)
            ),
            ranked.payload.eq(results.payload),
            ranked.valid.eq(present & job.rank & ~was_ranked),
            write.valid.eq(present & ~job.discard & ~was_written & asked),
            write.payload.data.eq(self._part(m, part, job.half)),
            write.payload.strobe.eq(-1),
            ranked_all.eq(~job.rank | was_ranked | ranked.ready),
            written_all.eq(job.discard | was_written | (asked & write.ready & last_part)),
            results.ready.eq(formats.r_rdy & ranked_all & written_all),
            taken.eq(results.valid & results.ready),
            self.done.eq(taken & results.payload.last),
            formats.r_en.eq(self.done),
        ]
        m.d.comb += offered.eq(present & ~job.discard & ~asked)
        with m.If(taken & (results.payload.row == job.tokens - 1)):
            m.d.sync += asked.eq(0)
        with m.Elif(self.write_command.valid & self.write_command.ready):
            m.d.sync += asked.eq(1)
        with m.If(write.valid & write.ready):
            m.d.sync += part.eq(Mux(last_part, 0, part + 1))
        with m.If(taken):
            m.d.sync += [was_ranked.eq(0), was_written.eq(0)]
        with m.Elif(present):
            m.d.sync += [was_ranked.eq(ranked_all), was_written.eq(written_all)]

    def _part(self, m: Module, part: Value, half: Value) -> Value:
        """Beat `part` of the result beat."""
        payload = self.results.payload
        lanes = [Mux(payload.strobe[i], lane, 0) for i, lane in enumerate(payload.data)]
        singles = Signal(_FP32_BITS * len(lanes))
        halves = Signal(FP16_BITS * len(lanes))
        m.d.comb += [singles.eq(Cat(lanes)), halves.eq(Cat(lane[:FP16_BITS] for lane in lanes))]
        # Beyond the packed beats the choice does not matter.
        return Mux(half, halves, singles).word_select(part, self.config.data.data_bits)
