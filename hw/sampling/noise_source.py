# SPDX-License-Identifier: Apache-2.0
"""The noise of a product's results, in their order, computed ahead of them."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import pipeline_stage
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.sampling.gumbel_transform import GumbelTransform
from speq.hw.sampling.philox import Philox

_WORD_BITS = 32
#: Tokens of a call of the generator, and cycles in which a transform takes their bits.
_TOKENS = 2
#: Of each number of rounds, words in the time of the latency, and the power of two above.
_DEPTHS = {1: 16, 2: 32, 5: 64}


def noise_start_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A product whose results need noise: its rows, its tiles, and the number of the first."""
    return data.StructLayout(
        {
            "tokens": config.engine.token_bits,
            "tile": config.tile_number_bits,
            "tiles": config.tiles_bits,
        }
    )


class NoiseSource(wiring.Component):
    """Noise of the results of a product: `speq.model.gumbel.gumbel` of seed, position and token.

    Of each tile, row after row, come cols / lanes words with the noise of one column for each lane:
    in word i of a row, lane j has column 2 (lanes (i // 2) + j) + i % 2. So the two values of a
    call of the generator are a lane's in two words that follow each other.

    Flow control: `noise` may stall; the words of a tile, and more than come in the time of the
    latency, are computed ahead. A start is taken when all calls for the one before have been made.
    The first word is offered `LATENCY` cycles after its start; then there are `config.noise_rounds`
    words in 5 cycles on average.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    seed : In(64)
    positions : In(ArrayLayout(32, rows))
        Of the token that each row chooses. With the seed, constant from a start to its last word.
    start : In(stream of noise_start_layout(config))
    noise : Out(stream of ArrayLayout(32, config.noise_lanes))
        FP32.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._generators = [Philox(config.noise_rounds) for _ in range(config.noise_lanes)]
        #: Cycles from a start to its first word.
        self.LATENCY = 1 + self._generators[0].LATENCY + GumbelTransform.LATENCY + RamFifo.LATENCY
        super().__init__(
            {
                "seed": In(2 * _WORD_BITS),
                "positions": In(data.ArrayLayout(_WORD_BITS, config.engine.rows)),
                "start": In(stream.Signature(noise_start_layout(config))),
                "noise": Out(stream.Signature(data.ArrayLayout(_WORD_BITS, config.noise_lanes))),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        # A tile's, so that the last one does not wait for its noise.
        words = config.engine.rows * config.engine.cols // config.noise_lanes
        depth = max(_DEPTHS[config.noise_rounds], 1 << (words - 1).bit_length())
        m.submodules.fifo = fifo = RamFifo(config.noise_lanes * _WORD_BITS, depth)
        generators = self._generators
        for lane, generator in enumerate(generators):
            m.submodules[f"generator_{lane}"] = generator

        # A call is made if its words will find room, and not in the cycle behind another one.
        call = Signal()
        room = Signal(range(depth + 1), init=depth)
        taken = self.noise.valid & self.noise.ready
        m.d.sync += room.eq(room + taken - Mux(call, _TOKENS, 0))
        called = Signal()
        m.d.sync += called.eq(call)
        self._call(m, generators, (room >= _TOKENS) & ~called, call)

        # All lanes do the same at the same time: first the even tokens, then the odd ones.
        odd_follow = Signal()
        valid = generators[0].valid
        m.d.sync += odd_follow.eq(valid)
        on_their_way = Signal(GumbelTransform.LATENCY)
        m.d.sync += on_their_way.eq(Cat(valid | odd_follow, on_their_way))
        noise = []
        for lane, generator in enumerate(generators):
            m.submodules[f"transform_{lane}"] = transform = GumbelTransform()
            words = generator.words
            (odd,) = pipeline_stage(m, lane, odd=Cat(words[3], words[2]))
            m.d.comb += transform.bits.eq(Mux(odd_follow, odd, Cat(words[1], words[0])))
            noise.append(transform.noise)
        m.d.comb += [
            fifo.write.valid.eq(on_their_way[-1]),
            fifo.write.payload.eq(Cat(noise)),
            self.noise.valid.eq(fifo.read.valid),
            self.noise.payload.eq(fifo.read.payload),
            fifo.read.ready.eq(self.noise.ready),
        ]
        return m

    def _call(self, m: Module, generators: list[Philox], may_call: Signal, call: Signal) -> None:
        """Go through tiles, rows and groups of columns, and call all generators for each."""
        config = self.config
        lanes, engine = config.noise_lanes, config.engine
        groups = engine.cols // (_TOKENS * lanes)
        running = Signal()
        left = Signal(noise_start_layout(config), reset_less=True)
        row = Signal(engine.row_bits)
        group = Signal(range(groups))
        m.d.comb += [
            self.start.ready.eq(~running),
            call.eq(running & may_call & generators[0].counters.ready),
        ]
        with m.If(self.start.valid & self.start.ready):
            m.d.sync += [left.eq(self.start.payload), running.eq(1)]
        for lane, generator in enumerate(generators):
            # The pair of tokens: the lane is its lowest bits.
            pair = Cat(Const(lane, (lanes - 1).bit_length()), group, left.tile)
            m.d.comb += [
                generator.key.eq(self.seed),
                generator.counters.valid.eq(running & may_call),
                generator.counters.payload[0].eq(pair),
                generator.counters.payload[1].eq(Array(self.positions)[row]),
            ]
        with m.If(call):
            m.d.sync += group.eq(group + 1)
            with m.If(group == groups - 1):
                m.d.sync += [group.eq(0), row.eq(row + 1)]
                with m.If(row + 1 == left.tokens):
                    m.d.sync += [
                        row.eq(0),
                        left.tile.eq(left.tile + 1),
                        left.tiles.eq(left.tiles - 1),
                    ]
                    with m.If(left.tiles == 1):
                        m.d.sync += running.eq(0)
