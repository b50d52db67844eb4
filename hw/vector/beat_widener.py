# SPDX-License-Identifier: Apache-2.0
"""Beats of FP16 numbers as beats of FP32 numbers."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, EnableInserter, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.vector.fp16_to_fp32 import Fp16ToFp32

_FP32_BITS = 32


class BeatWidener(wiring.Component):
    """With `half`, of each beat of FP16 numbers two beats of FP32 numbers, the lower half first;
    without, the beats as they are.

    Flow control: both streams may stall in any cycle. With `half` a beat is offered `LATENCY`
    cycles after the half that it is made of, one per cycle without stalls; without `half` in the
    same cycle.

    Parameters
    ----------
    data_bits : int
        Bits of a beat, a multiple of 32.

    Members
    -------
    half : In(1)
        To be kept while there are beats.
    beats : In(stream of data_bits)
    widened : Out(stream of data_bits)

    Raises
    ------
    ValueError
        If `data_bits` is not such a number.
    """

    #: Cycles from a beat of FP16 numbers to the first of FP32 numbers.
    LATENCY = 1 + Fp16ToFp32.LATENCY

    def __init__(self, data_bits: int) -> None:
        if data_bits < _FP32_BITS or data_bits % _FP32_BITS:
            raise ValueError(f"data_bits is {data_bits!r}; allowed are multiples of {_FP32_BITS}")
        self.data_bits = data_bits
        super().__init__(
            {
                "half": In(1),
                "beats": In(stream.Signature(data_bits)),
                "widened": Out(stream.Signature(data_bits)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        beats, widened = self.beats, self.widened
        upper = Signal()  # the half that is next
        chosen = Signal(self.data_bits // 2, reset_less=True)
        stages = Signal(self.LATENCY)  # which of them hold numbers, the highest converted ones
        step = Signal()
        m.d.comb += step.eq(~stages[-1] | widened.ready)
        numbers = []
        for i in range(self.data_bits // _FP32_BITS):
            converter = Fp16ToFp32()
            m.submodules[f"converter_{i}"] = EnableInserter(step)(converter)
            m.d.comb += converter.fp16.eq(chosen.word_select(i, _FP32_BITS // 2))
            numbers.append(converter.fp32)
        with m.If(step):
            m.d.sync += [
                chosen.eq(beats.payload.word_select(upper, len(chosen))),
                stages.eq(Cat(beats.valid & self.half, stages)),
                upper.eq(upper ^ (beats.valid & self.half)),
            ]
        m.d.comb += [
            widened.payload.eq(Mux(self.half, Cat(*numbers), beats.payload)),
            widened.valid.eq(Mux(self.half, stages[-1], beats.valid)),
            beats.ready.eq(Mux(self.half, step & upper, widened.ready)),
        ]
        return m
