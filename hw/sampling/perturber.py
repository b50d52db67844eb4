# SPDX-License-Identifier: Apache-2.0
"""Logits on their way to the ranker, scaled and with noise."""

from __future__ import annotations

from amaranth.hdl import Array, Elaboratable, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.common.logic import pipeline_stage
from speq.hw.sampling.noise_source import NoiseSource, noise_start_layout
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_multiplier import Fp32Multiplier

_FP32_BITS = 32


class Perturber(wiring.Component):
    """The results of products as sampled decoding ranks them, or as they are.

    Formula, with `sample`: ``fp32(fp32(logit * scale) + noise)`` in every column, which is
    `speq.model.speculation.perturbed` without truncation. Without `sample` results pass in the same
    cycle, there must be no start, and the rest has no meaning.

    Flow control: all streams may stall. With `sample`, the results must keep the beat on offer
    until it is taken, each needs a start before it, and it is taken with its perturbed beat, which
    is offered cols / lanes + `LATENCY` cycles after it if its noise is there.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    sample : In(1)
    scale : In(32)
        1 / T, FP32.
    seed, positions, start
        As of `NoiseSource`.
    results : In(stream of gemm_engine.result_layout(config.engine))
    perturbed : Out(stream of gemm_engine.result_layout(config.engine))
    """

    #: Cycles from the last column's choice to the whole beat on offer.
    LATENCY = 1 + Fp32Multiplier.LATENCY + Fp32Adder.LATENCY

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        source = NoiseSource(config)
        results = stream.Signature(result_layout(config.engine))
        super().__init__(
            {
                "sample": In(1),
                "scale": In(_FP32_BITS),
                "seed": In(64),
                "positions": In(source.positions.shape()),
                "start": In(stream.Signature(noise_start_layout(config))),
                "results": In(results),
                "perturbed": Out(results),
            }
        )
        self._source = source

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        lanes, cols = self.config.noise_lanes, self.config.engine.cols
        beat, noise = self.results.payload, self._source.noise
        m.submodules.source = source = self._source
        wiring.connect(m, wiring.flipped(self.start), source.start)
        m.d.comb += [source.seed.eq(self.seed), source.positions.eq(self.positions)]

        # Words of a beat, one column for each lane, go into the pipeline, and come out together.
        words = cols // lanes
        columns = [[2 * (lanes * (i // 2) + j) + i % 2 for i in range(words)] for j in range(lanes)]
        entered, left = Signal(range(words + 1)), Signal(range(words + 1))
        enters, complete = Signal(), Signal()
        under_way = Signal(self.LATENCY)
        whole = Signal(data.ArrayLayout(_FP32_BITS, cols), reset_less=True)
        m.d.comb += [
            enters.eq(self.results.valid & self.sample & (entered != words) & noise.valid),
            noise.ready.eq(self.results.valid & self.sample & (entered != words)),
            complete.eq(left == words),
        ]
        m.d.sync += [
            under_way.eq((under_way << 1) | enters),
            entered.eq(entered + enters),
            left.eq(left + under_way[-1]),
        ]
        for j in range(lanes):
            m.submodules[f"multiplier_{j}"] = multiplier = Fp32Multiplier()
            m.submodules[f"adder_{j}"] = adder = Fp32Adder()
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
            for i, column in enumerate(columns[j]):
                with m.If(under_way[-1] & (left == i)):
                    m.d.sync += whole[column].eq(adder.sum)

        perturbed = self.perturbed
        m.d.comb += [perturbed.payload.eq(beat), perturbed.valid.eq(self.results.valid)]
        with m.If(self.sample):
            m.d.comb += [perturbed.payload.data.eq(whole), perturbed.valid.eq(complete)]
        m.d.comb += self.results.ready.eq(perturbed.ready & (complete | ~self.sample))
        with m.If(complete & perturbed.ready):
            m.d.sync += [entered.eq(0), left.eq(0)]
        return m
