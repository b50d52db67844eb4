# SPDX-License-Identifier: Apache-2.0
"""Logits on their way to the ranker, scaled and with noise, and the cut-off of each row."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.common.logic import pipeline_stage
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.control.ranker import order_key, rank_start_layout
from speq.hw.sampling.noise_source import NoiseSource
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_multiplier import Fp32Multiplier

_FP32_BITS = 32
#: Starts that wait.
_STARTS = 2
#: Beats, of four words or more, that have entered and do not have all their sums.
_ENTERED = 4


def perturber_start_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A product whose results are to be ranked, with the number of its tiles. With `again` it is
    the one before, and the largest logits of that one stay."""
    members = rank_start_layout(config).members
    return data.StructLayout(dict(members) | {"tiles": config.tiles_bits, "again": 1})


class Perturber(wiring.Component):
    """The results of products as sampled decoding ranks them, or as they are.

    Formula, with `sample`: ``fp32(fp32(logit * scale) + noise)`` in every column.

    With `truncate` as well, a row has a cut-off, ``fp32(largest + cutoff)``, of the largest of its
    logits so far: in strobed columns that are among the start's, of its beats up to this one, and
    with `keep` or `again` of the product before. It goes along with each beat, as do its logits,
    for a `Ranker` that drops what is below it. As it never falls, columns that are below the row's
    cut-off of the beat before, as most are, are not strobed to begin with.

    Without `sample`, results pass in the same cycle. It may change when nothing is under way.

    Flow control: all streams may stall, and must keep what is on offer until it is taken. Starts
    are passed on a cycle later or more; two can wait. With `sample`, one is passed on when all
    noise of the one before has been asked for; its own is made also while the ranker does not take
    it yet, and its results wait until it has. A beat is taken in cols / lanes cycles if its noise
    is there, and so many can be under way that the ranker may fall behind by the beats of four
    tiles; a perturbed one is offered cols / lanes + `LATENCY` cycles after the beat. With
    `truncate` this is `truncate_cycles` later, and the beat stays on offer until then, so that only
    one is under way.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    sample, truncate : In(1)
    scale, cutoff : In(32)
        1 / T and T ln(min-p), FP32.
    seed, positions
        As of `NoiseSource`.
    start : In(stream of perturber_start_layout(config))
    rank_start : Out(stream of rank_start_layout(config))
    results : In(stream of gemm_engine.result_layout(config.engine))
    perturbed : Out(stream of gemm_engine.result_layout(config.engine))
    truncates : Out(1)
        Both of `sample` and `truncate`.
    logits : Out(ArrayLayout(32, cols)), row_cutoff : Out(32)
        With a perturbed beat, if it truncates: the result beat's FP32 logits, and the order key of
        the row's cut-off.
    """

    #: Cycles from a column's choice to its sum.
    _SUM_CYCLES = 1 + Fp32Multiplier.LATENCY + Fp32Adder.LATENCY
    #: Cycles, but for those of its words, from a beat to its perturbed one on offer.
    LATENCY = _SUM_CYCLES - 1 + RamFifo.LATENCY

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._source = source = NoiseSource(config)
        self._words = config.engine.cols // config.noise_lanes
        #: Beats under way at the same time: a power of two. They hide their latency, and the first
        #: tiles can wait here, which the ranker inserts much of.
        self._beats = 4 << (config.engine.rows - 1).bit_length()
        levels = (config.noise_lanes - 1).bit_length()
        #: From the choice of the last column of each lane: its key, the lane's largest, the largest
        #: of all lanes and that of the row.
        self._largest_cycles = 4 + levels
        # It is added to as soon as an adder is free.
        adds = max(self._largest_cycles, self._SUM_CYCLES - Fp32Adder.LATENCY + 1)
        self._settling = adds + Fp32Adder.LATENCY + 1
        #: Cycles from a perturbed beat to its row's cut-off.
        self.truncate_cycles = self._settling - self.LATENCY - 1
        results = stream.Signature(result_layout(config.engine))
        super().__init__(
            {
                "sample": In(1),
                "truncate": In(1),
                "scale": In(_FP32_BITS),
                "cutoff": In(_FP32_BITS),
                "seed": In(64),
                "positions": In(source.positions.shape()),
                "start": In(stream.Signature(perturber_start_layout(config))),
                "rank_start": Out(stream.Signature(rank_start_layout(config))),
                "results": In(results),
                "perturbed": Out(results),
                "truncates": Out(1),
                "logits": Out(data.ArrayLayout(_FP32_BITS, config.engine.cols)),
                "row_cutoff": Out(_FP32_BITS),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.source = self._source
        m.d.comb += [
            self._source.seed.eq(self.seed),
            self._source.positions.eq(self.positions),
            self.truncates.eq(self.sample & self.truncate),
            self.logits.eq(self.results.payload.data),
        ]
        self._perturb(m, *self._begin(m))
        return m

    def _begin(self, m: Module) -> tuple[Signal, data.View]:
        """Pass starts on, each to source and ranker as soon as it takes it; the one that the ranker
        takes in this cycle."""
        layout = self.start.payload.shape()
        m.submodules.starts = starts = SyncFIFO(width=layout.size, depth=_STARTS)
        m.d.comb += [
            self.start.ready.eq(starts.w_rdy),
            starts.w_en.eq(self.start.valid),
            starts.w_data.eq(self.start.payload),
        ]
        start = data.View(layout, starts.r_data)
        source, ranker = self._source.start, self.rank_start
        for target in (source, ranker):
            for name, _ in target.payload.shape():
                m.d.comb += target.payload[name].eq(start[name])
        was_asked = Signal()  # noise for it has been asked for
        asked = Signal()
        m.d.comb += [
            source.valid.eq(starts.r_rdy & self.sample & ~was_asked),
            asked.eq(was_asked | source.ready | ~self.sample),
            ranker.valid.eq(starts.r_rdy & asked),
            starts.r_en.eq(ranker.valid & ranker.ready),
        ]
        m.d.sync += was_asked.eq(ranker.valid & self.sample & ~ranker.ready)
        return starts.r_en, start

    def _perturb(self, m: Module, starts: Signal, start: data.View) -> None:
        """Words of a beat, one column for each lane, go into the pipeline and come out together."""
        lanes, cols = self.config.noise_lanes, self.config.engine.cols
        beat, noise = self.results.payload, self._source.noise
        words = self._words
        columns = [[2 * (lanes * (i // 2) + j) + i % 2 for i in range(words)] for j in range(lanes)]
        entered, left = Signal(range(words + 1)), Signal(range(words))
        begun = Signal()  # the start of the beat's product has been taken
        wants, enters, ends, goes = Signal(), Signal(), Signal(), Signal()
        under_way = Signal(self._SUM_CYCLES)
        sums = Signal(data.ArrayLayout(_FP32_BITS, cols))
        kept = Signal(data.ArrayLayout(_FP32_BITS, cols), reset_less=True)
        reached = Signal(cols, reset_less=True)
        counted = Signal(cols, reset_less=True)
        settled = Signal()
        known = Signal(self.config.engine.rows)  # rows that have a largest logit
        beats = Signal(range(self._beats + 1))  # under way
        others = Cat(beat.strobe, beat.row, beat.last)
        # Beats go as they have come, with other values.
        m.submodules.others = other_fifo = SyncFIFO(width=len(others), depth=_ENTERED)
        m.submodules.perturbed = fifo = RamFifo(_FP32_BITS * cols + len(others), self._beats)
        may_begin = beats < Mux(self.truncate, 1, self._beats)
        m.d.comb += [
            wants.eq(
                (self.results.valid & self.sample & begun)
                & (entered != words)
                & ((entered != 0) | may_begin)
            ),
            enters.eq(wants & noise.valid),
            noise.ready.eq(wants),
            ends.eq(enters & (entered == words - 1)),
            other_fifo.w_en.eq(ends),
            other_fifo.w_data.eq(others),
            other_fifo.r_en.eq(fifo.write.valid),
            fifo.write.valid.eq(under_way[-1] & (left == words - 1)),
            fifo.write.payload.eq(Cat(sums, other_fifo.r_data)),
            fifo.read.ready.eq(goes),
        ]
        m.d.sync += [
            under_way.eq(Cat(enters, under_way)),
            left.eq(left + under_way[-1]),  # words are a power of two
            beats.eq(beats + (enters & (entered == 0)) - goes),
        ]
        with m.If(Mux(self.truncate, goes, ends)):
            m.d.sync += entered.eq(0)
        with m.Else():
            m.d.sync += entered.eq(entered + enters)
        with m.If(starts):
            m.d.sync += [counted.eq(start.columns), begun.eq(1)]
        with m.Elif(self.results.valid & self.results.ready & beat.last):
            m.d.sync += begun.eq(0)

        keys, counts = [], []
        largest = Signal(_FP32_BITS)
        first_cutoff = Signal(_FP32_BITS, reset_less=True)  # of the row when the beat came
        (word,) = pipeline_stage(m, 1, word=entered)
        (word,) = pipeline_stage(m, 2, word=word)
        for j in range(lanes):
            m.submodules[f"adder_{j}"] = adder = Fp32Adder()
            m.submodules[f"multiplier_{j}"] = multiplier = Fp32Multiplier()
            chosen = Array(beat.data[column] for column in columns[j])[entered]
            counts_here = Array((beat.strobe & counted)[column] for column in columns[j])[entered]
            logit, added, counts_here = pipeline_stage(
                m,
                1,
                **{
                    f"logit_{j}": chosen,
                    f"noise_{j}": noise.payload[j],
                    f"counts_{j}": counts_here & enters,
                },
            )
            for stage in range(2, 2 + Fp32Multiplier.LATENCY):
                (added,) = pipeline_stage(m, stage, **{f"noise_{j}": added})
            m.d.comb += [
                multiplier.a.eq(logit),
                multiplier.b.eq(self.scale),
                adder.a.eq(multiplier.product),
                adder.b.eq(added),
            ]
            if j == 0:
                # When all words have left it, this adder makes the cut-off.
                with m.If(~under_way[Fp32Multiplier.LATENCY]):
                    m.d.comb += [adder.a.eq(largest), adder.b.eq(self.cutoff)]
                (row_cutoff,) = pipeline_stage(m, 0, row_cutoff=order_key(adder.sum))
                m.d.comb += self.row_cutoff.eq(row_cutoff)
            key, counts_here = pipeline_stage(
                m, 2, **{f"key_{j}": order_key(logit), f"counts_{j}": counts_here}
            )
            for i, column in enumerate(columns[j]):
                with m.If(word == i):
                    m.d.sync += reached[column].eq(key >= first_cutoff)
                m.d.comb += sums[column].eq(Mux(left == i, adder.sum, kept[column]))
            keys.append(key)
            counts.append(counts_here)
        self._track(m, keys, counts, largest, first_cutoff, goes, known)
        with m.If(starts & ~start.keep & ~start.again):
            m.d.sync += known.eq(0)

        m.d.sync += kept.eq(sums)

        # The cut-off is there so many cycles behind the last word's choice.
        settling = Signal(self._settling - 1)
        m.d.sync += settling.eq(Cat(ends, settling))
        with m.If(settling[-1]):
            m.d.sync += settled.eq(1)
        with m.If(goes):
            m.d.sync += settled.eq(0)

        perturbed, out = self.perturbed, self.perturbed.payload
        m.d.comb += [
            out.eq(beat),
            perturbed.valid.eq(self.results.valid),
            self.results.ready.eq(perturbed.ready),
        ]
        with m.If(self.sample):
            m.d.comb += [
                Cat(out.data, out.strobe, out.row, out.last).eq(fifo.read.payload),
                perturbed.valid.eq(fifo.read.valid & (settled | ~self.truncate)),
                goes.eq(perturbed.valid & perturbed.ready),
                self.results.ready.eq(Mux(self.truncate, goes, ends)),
            ]
            with m.If(self.truncate):
                m.d.comb += out.strobe.eq(beat.strobe & reached)

    def _track(
        self,
        m: Module,
        keys: list[Signal],
        counts: list[Signal],
        largest: Signal,
        first_cutoff: Signal,
        goes: Signal,
        known: Signal,
    ) -> None:
        """The largest logit of the beat's row, of order keys and whether they count, and those of
        all rows with their cut-offs, if they are known."""
        rows, row = self.config.engine.rows, self.results.payload.row
        row_keys, cutoffs = (
            Array(Signal(_FP32_BITS, name=f"{name}_{i}", reset_less=True) for i in range(rows))
            for name in ("largest", "cutoff")
        )
        is_known = known.bit_select(row, 1).replicate(_FP32_BITS)
        m.d.sync += first_cutoff.eq(cutoffs[row] & is_known)
        (before,) = pipeline_stage(m, 1, before=row_keys[row] & is_known)

        values = []
        for j, (key, count) in enumerate(zip(keys, counts, strict=True)):
            value = Signal(_FP32_BITS, name=f"lane_largest_{j}")
            with m.If(goes):
                m.d.sync += value.eq(0)
            with m.Elif(count & (key > value)):
                m.d.sync += value.eq(key)
            values.append(value)
        level = 2
        while len(values) > 1:
            pairs = enumerate(zip(values[::2], values[1::2], strict=True))
            values = [
                pipeline_stage(m, level, **{f"larger_{i}": Mux(a > b, a, b)})[0]
                for i, (a, b) in pairs
            ]
            level += 1
        (now,) = pipeline_stage(m, level, now=Mux(before > values[0], before, values[0]))
        # The number that has this key.
        m.d.comb += largest.eq(Mux(now[-1], Cat(now[:-1], Const(0, 1)), ~now))
        with m.If(goes):
            m.d.sync += [
                row_keys[row].eq(now),
                cutoffs[row].eq(self.row_cutoff),
                known.bit_select(row, 1).eq(1),
            ]
