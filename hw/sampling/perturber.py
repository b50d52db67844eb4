# SPDX-License-Identifier: Apache-2.0
"""Logits on their way to the ranker, scaled, with noise, and without those below the cut-off."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.common.logic import pipeline_stage
from speq.hw.control.ranker import Ranker, order_key, rank_start_layout
from speq.hw.sampling.noise_source import NoiseSource
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_multiplier import Fp32Multiplier

_FP32_BITS = 32


def perturber_start_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A product whose results are to be ranked, with the number of its tiles."""
    members = rank_start_layout(config).members
    return data.StructLayout(dict(members) | {"tiles": config.tiles_bits})


class Perturber(wiring.Component):
    """The results of products as sampled decoding ranks them, or as they are.

    Formula, with `sample`: ``fp32(fp32(logit * scale) + noise)`` in every column. With `truncate`
    as well, columns whose logit is below ``fp32(largest + cutoff)`` are not strobed; the largest
    logit of each row is that of the last ranking, read at a start without `keep`. Together this is
    `speq.model.speculation.perturbed` with min-p.

    Without `sample`, starts and results pass in the same cycle. It may change when nothing is under
    way.

    Flow control: all streams may stall, and must keep what is on offer until it is taken. With
    `sample`, a start is passed on when all noise of the one before has been asked for, and with
    `truncate` but without `keep` `CUTOFF_CYCLES` cycles and one for each row later. A beat is taken
    with its perturbed beat, which is offered cols / lanes + `LATENCY` cycles after it if its noise
    is there.

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
    loading : Out(1)
        The last ranking is being read.
    row : Out(range(rows))
    largest : In(32)
        Of `row` in the cycle before, if `loading`.
    """

    #: Cycles from the last column's choice to the whole beat on offer.
    LATENCY = 1 + Fp32Multiplier.LATENCY + Fp32Adder.LATENCY
    #: Cycles from a row's choice to its cut-off, and one in which all are there.
    CUTOFF_CYCLES = Ranker.LATENCY + Fp32Adder.LATENCY + 1

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._source = source = NoiseSource(config)
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
                "loading": Out(1),
                "row": Out(config.engine.row_bits),
                "largest": In(_FP32_BITS),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.source = self._source
        m.d.comb += [
            self._source.seed.eq(self.seed),
            self._source.positions.eq(self.positions),
        ]
        adders = [Fp32Adder() for _ in range(self.config.noise_lanes)]
        for j, adder in enumerate(adders):
            m.submodules[f"adder_{j}"] = adder
        cutoffs = self._load(m, adders[0])
        self._perturb(m, adders, cutoffs)
        return m

    def _load(self, m: Module, adder: Fp32Adder) -> Array:
        """Pass starts on, some of them behind the sums of the cut-offs; their order keys by row."""
        rows = self.config.engine.rows
        cutoffs = Array(
            Signal(_FP32_BITS, name=f"cutoff_{row}", reset_less=True) for row in range(rows)
        )
        delay = self.CUTOFF_CYCLES - 1
        elapsed = Signal(range(rows + delay + 1))
        loaded = elapsed == rows + delay
        start, source, ranker = self.start, self._source.start, self.rank_start
        needs = start.valid & self.sample & self.truncate & ~start.payload.keep
        goes = self.sample & (~needs | loaded)
        for target in (source, ranker):
            for name, _ in target.payload.shape():
                m.d.comb += target.payload[name].eq(start.payload[name])
        m.d.comb += [
            self.loading.eq(needs & ~loaded),
            self.row.eq(elapsed),
            source.valid.eq(start.valid & goes & ranker.ready),
            ranker.valid.eq(start.valid & Mux(self.sample, goes & source.ready, 1)),
            start.ready.eq(ranker.ready & Mux(self.sample, goes & source.ready, 1)),
        ]
        with m.If(self.loading):
            m.d.sync += elapsed.eq(elapsed + 1)
            for row, cutoff in enumerate(cutoffs):
                with m.If(elapsed == row + delay):
                    m.d.sync += cutoff.eq(order_key(adder.sum))
        with m.Elif(start.valid & start.ready):
            m.d.sync += elapsed.eq(0)
        return cutoffs

    def _perturb(self, m: Module, adders: list[Fp32Adder], cutoffs: Array) -> None:
        """Words of a beat, one column for each lane, go into the pipeline and come out together."""
        lanes, cols = self.config.noise_lanes, self.config.engine.cols
        beat, noise = self.results.payload, self._source.noise
        words = cols // lanes
        columns = [[2 * (lanes * (i // 2) + j) + i % 2 for i in range(words)] for j in range(lanes)]
        entered, left = Signal(range(words + 1)), Signal(range(words + 1))
        wants, enters, complete = Signal(), Signal(), Signal()
        under_way = Signal(self.LATENCY)
        whole = Signal(data.ArrayLayout(_FP32_BITS, cols), reset_less=True)
        reached = Signal(cols, reset_less=True)
        m.d.comb += [
            wants.eq(self.results.valid & self.sample & (entered != words)),
            enters.eq(wants & noise.valid),
            noise.ready.eq(wants),
            complete.eq(left == words),
        ]
        m.d.sync += [
            under_way.eq(Cat(enters, under_way)),
            entered.eq(entered + enters),
            left.eq(left + under_way[-1]),
        ]
        (word,) = pipeline_stage(m, 0, word=entered)
        cutoff = cutoffs[beat.row]
        for j, adder in enumerate(adders):
            m.submodules[f"multiplier_{j}"] = multiplier = Fp32Multiplier()
            chosen = Array(beat.data[column] for column in columns[j])[entered]
            names = {f"logit_{j}": chosen, f"noise_{j}": noise.payload[j]}
            logit, added = pipeline_stage(m, 0, **names)
            for stage in range(1, 1 + Fp32Multiplier.LATENCY):
                (added,) = pipeline_stage(m, stage, **{f"noise_{j}": added})
            m.d.comb += [
                multiplier.a.eq(logit),
                multiplier.b.eq(self.scale),
                adder.a.eq(multiplier.product),
                adder.b.eq(added),
            ]
            if j == 0:
                with m.If(self.loading):
                    m.d.comb += [adder.a.eq(self.largest), adder.b.eq(self.cutoff)]
            reaches = ~self.truncate | (order_key(logit) >= cutoff)
            for i, column in enumerate(columns[j]):
                with m.If(word == i):
                    m.d.sync += reached[column].eq(reaches)
                with m.If(under_way[-1] & (left == i)):
                    m.d.sync += whole[column].eq(adder.sum)

        perturbed = self.perturbed
        m.d.comb += [perturbed.payload.eq(beat), perturbed.valid.eq(self.results.valid)]
        with m.If(self.sample):
            m.d.comb += [
                perturbed.payload.data.eq(whole),
                perturbed.payload.strobe.eq(beat.strobe & reached),
                perturbed.valid.eq(complete),
            ]
        m.d.comb += self.results.ready.eq(perturbed.ready & (complete | ~self.sample))
        with m.If(complete & perturbed.ready):
            m.d.sync += [entered.eq(0), left.eq(0)]
