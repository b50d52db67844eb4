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

    Flow control: both streams may stall in any cycle; without stalls there is a beat per cycle. A
    beat is offered a cycle after it was taken, with `half` `LATENCY` cycles later than that.

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

    #: Cycles that a beat takes longer with `half`.
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
        # What comes from a RAM is late in the cycle: nothing is done with it at first.
        beat = Signal(self.data_bits, reset_less=True)
        has_beat = Signal()
        leaves = Signal()
        m.d.comb += beats.ready.eq(~has_beat | leaves)
        with m.If(beats.ready):
            m.d.sync += [beat.eq(beats.payload), has_beat.eq(beats.valid)]

        upper = Signal()  # the half that is next
        chosen = Signal(self.data_bits // 2, reset_less=True)
        stages = Signal(self.LATENCY)  # those with numbers: chosen, converted
        step = Signal()
        numbers = []
        for i in range(self.data_bits // _FP32_BITS):
            converter = Fp16ToFp32()
            m.submodules[f"converter_{i}"] = EnableInserter(step)(converter)
            m.d.comb += converter.fp16.eq(chosen.word_select(i, _FP32_BITS // 2))
            numbers.append(converter.fp32)
        chooses = has_beat & self.half
        with m.If(step):
            m.d.sync += [
                chosen.eq(beat.word_select(upper, len(chosen))),
                stages.eq(Cat(chooses, stages)),
                upper.eq(upper ^ chooses),
            ]
        m.d.comb += [
            step.eq(~stages[-1] | widened.ready),
            leaves.eq(Mux(self.half, step & upper, widened.ready)),
            widened.payload.eq(Mux(self.half, Cat(*numbers), beat)),
            widened.valid.eq(Mux(self.half, stages[-1], has_beat)),
        ]
        return m
