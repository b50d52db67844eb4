# SPDX-License-Identifier: Apache-2.0
"""Testbench of the PE: sums of random length, mode and operands, back to back.

The design under test holds PEs of several kinds side by side, as building a design takes long, and
many of each kind, each with operands of its own. A *slot* is one step of a PE: an operand pair, or
a bubble. All slots are planned in advance; what the accumulator holds after each of them is known
from Python's integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Cat, Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.array.operands import activation_layout, multiples, weight_layout
from speq.hw.array.pe import Pe
from speq.hw.common.unit import Unit
from speq.hw.engine_config import (
    BLOCK_MAGNITUDE_BITS,
    DRAFT_LANES,
    FP16_MAX_EXPONENT,
    LANE_BITS,
    PRODUCT_UNIT_EXPONENT,
    EngineConfig,
)
from speq.hw.verilog import convert_unit
from speq.model.number_format import SCALE_NUMERATORS, SPLITS, FormatConfig, draft_levels
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, pack, pad, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_MAX_K = 4096
#: Words of stimulus per PE: weight; activation and controls.
_PE_WORDS = 2
#: Words observed per PE: `drain_out` in two, `weight_out` in one.
_OBSERVED_WORDS = 3
#: Bits of the controls in the activation's word.
_FIRST, _DRAIN, _DRAFT = 60, 61, 62

_NEGATIVE = 0x8000
_LARGEST = 0x7BFF
_MAGNITUDES = (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, _LARGEST)
_CORNERS = np.array([magnitude | sign for magnitude in _MAGNITUDES for sign in (0, _NEGATIVE)])
_MAX_MAGNITUDE = 2**BLOCK_MAGNITUDE_BITS - 1
#: A block activation's unit is 2^(E - 15 - 6), of which `exponent` is E - 1.
_MIN_BLOCK_UNIT = 1 - 15 - 6

#: The first PEs begin with a verify and a draft sum of exactly `_MAX_K` MACs: PE 0 with the largest
#: products, PE 1 with the largest negative ones, the others with random ones.
_DIRECTED_PES = 3
_EXTREME_PES = 2
_DIRECTED_SLOTS = _MAX_K + _MAX_K // DRAFT_LANES


@dataclass(frozen=True)
class _Plan:
    """What every slot does; arrays [slots, PEs].

    Attributes
    ----------
    work : bool
        It is not a bubble.
    draft : bool
        The weight operand is a draft operand.
    step : int64
        Slots since the first one of the sum; 0 starts a sum.
    """

    work: np.ndarray
    draft: np.ndarray
    step: np.ndarray

    def macs(self) -> dict[str, int]:
        """MACs by mode."""
        return {
            "verify": int((self.work & ~self.draft).sum()),
            "draft": DRAFT_LANES * int((self.work & self.draft).sum()),
        }


@dataclass(frozen=True)
class _Operands:
    """Operands of every slot; arrays [slots, PEs].

    Attributes
    ----------
    weight, activation : uint64
        As the PE takes them.
    factor, exponent : int64
        Their product is ``factor * 2^exponent``.
    """

    weight: np.ndarray
    activation: np.ndarray
    factor: np.ndarray
    exponent: np.ndarray


@dataclass(frozen=True)
class _Kind:
    """PEs of one kind: with draft hardware or without, how many, and the MACs in each mode that
    they do together at least."""

    draft: bool
    split: int
    pes: int = 8
    macs: int = 250_000

    def pe(self) -> Pe:
        """A PE of this kind."""
        form = FormatConfig(split=self.split)
        config = EngineConfig(rows=1, cols=1, max_k=_MAX_K, format=form)
        return Pe(config, draft=self.draft)


_REFERENCE = FormatConfig().split
_KINDS = {
    "dual": _Kind(draft=True, split=_REFERENCE, pes=32, macs=1_000_000),
    "fp16": _Kind(draft=False, split=_REFERENCE, pes=32, macs=1_000_000),
} | {f"split_{split}": _Kind(draft=True, split=split) for split in SPLITS if split != _REFERENCE}


class _Bench(wiring.Component):
    """PEs side by side, each with operands and controls of its own."""

    def __init__(self, units: Mapping[str, Pe]) -> None:
        self.units = units
        kinds = [_KINDS[name] for name in units]
        words = sum(_PE_WORDS * kind.pes for kind in kinds)
        observed = sum(_OBSERVED_WORDS * kind.pes for kind in kinds)
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(WORD_BITS, words)),
                "observed": Out(data.ArrayLayout(WORD_BITS, observed)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        words, results = iter(self.stimulus), iter(self.observed)
        for name, pe in self.units.items():
            layout = activation_layout(draft=pe.has_draft)
            for i in range(_KINDS[name].pes):
                weight, activation = next(words), next(words)
                operand = data.View(layout, activation[: layout.size])
                m.submodules[f"{name}_{i}"] = unit = Unit(f"pe_{name}", pe)
                low, high, weight_out = next(results), next(results), next(results)
                m.d.comb += [
                    unit.weight_in.eq(weight),
                    unit.activation.eq(multiples(m, pe.config, operand, f"multiples_{name}_{i}")),
                    unit.first.eq(activation[_FIRST]),
                    unit.drain.eq(activation[_DRAIN]),
                    Cat(low, high).eq(unit.drain_out),
                    weight_out.eq(unit.weight_out),
                ]
                if pe.has_draft:
                    m.d.comb += unit.draft.eq(activation[_DRAFT : _DRAFT + 2])
        return m


def run() -> None:
    """Check PEs with and without draft hardware, and with all splits."""
    units = {name: kind.pe() for name, kind in _KINDS.items()}
    verilog = file_bench_verilog(_Bench(units), "pe_tb")
    modules = [convert_unit(pe, f"pe_{name}", reset=False) for name, pe in units.items()]
    simulate(verilog + "".join(modules), "pe_tb", __name__)


@cocotb.test()
async def random_sums(dut: Any) -> None:
    """All accumulator bits after the last step of every sum, and after every other step."""
    cases = {name: _Case(kind) for name, kind in _KINDS.items()}
    for name, case in cases.items():
        dut._log.info(
            f"seed {seed()}, {name}: {len(case.plan.step):,} cycles of {case.kind.pes} PEs, "
            f"MACs: {case.plan.macs()}"
        )
    cycles = max(case.cycles for case in cases.values())
    stimulus = [pad(case.stimulus(), cycles) for case in cases.values()]
    observed = await play_files(dut, np.concatenate(stimulus, axis=1))
    start = 0
    for name, case in cases.items():
        end = start + _OBSERVED_WORDS * case.kind.pes
        case.check(name, observed[: case.cycles, start:end])
        start = end


class _Case:
    """What the PEs of a kind do."""

    def __init__(self, kind: _Kind) -> None:
        rng = np.random.default_rng(seed())
        self.kind, self.pe = kind, kind.pe()
        self.plan = plan = _plan(rng, kind)
        self.operands = _operands(rng, plan, self.pe)
        self.cycles = len(plan.step) + self.pe.LATENCY
        ends_sum = np.concatenate([plan.step[1:] == 0, np.ones((1, kind.pes), bool)])
        self.drain = ends_sum | (rng.random(plan.step.shape) < 0.5)

    def stimulus(self) -> np.ndarray:
        """uint64 [cycles, words]: everything about a slot in the cycle in which the PE takes it."""
        plan, slots, pes = self.plan, len(self.plan.step), self.kind.pes
        stimulus = np.zeros((self.cycles, _PE_WORDS * pes), np.uint64)
        weight, controls = (stimulus[:, i::_PE_WORDS] for i in range(_PE_WORDS))
        weight[:slots] = self.operands.weight
        multiply, scale = 1, 2
        # The weight operand of a bubble may be a draft operand, and has to be treated as one.
        for delay, value, position in (
            (multiply, self.operands.activation, 0),
            (multiply, plan.draft, _DRAFT),
            (scale, plan.draft, _DRAFT + 1),
            (self.pe.ACCUMULATE, plan.step == 0, _FIRST),
            (self.pe.LATENCY, self.drain, _DRAIN),
        ):
            controls[delay : delay + slots] |= value.astype(np.uint64) << np.uint64(position)
        return stimulus

    def check(self, name: str, observed: np.ndarray) -> None:
        """Compare what was observed, uint64 [cycles, words]."""
        plan, operands, pes = self.plan, self.operands, self.kind.pes
        slots = len(plan.step)
        observed = observed.reshape(self.cycles, pes, _OBSERVED_WORDS)
        assert_equal_bits(
            f"Pe.weight_out, {name}",
            expected=operands.weight,
            got=observed[1 : 1 + slots, :, 2],
            cycles=np.arange(1, 1 + slots)[:, None],
        )
        results = slice(self.pe.LATENCY, None)
        sums = _sums(plan, operands, self.pe)
        expected = np.where(self.drain, sums, 0)
        # Short sums first: the report then shows all operands of a sum, and not its last ones.
        order = np.argsort(plan.step, axis=None, kind="stable")
        slot, place = np.divmod(order, pes)
        assert_equal_bits(
            f"Pe.drain_out, {name}",
            expected=expected[slot, place],
            got=_integers(observed[results, :, :2])[slot, place],
            operands={
                "PE": place,
                "draft": plan.draft[slot, place],
                "step of the sum": plan.step[slot, place],
                "weight": operands.weight[slot, place],
                "activation": operands.activation[slot, place],
                "drain": self.drain[slot, place],
            },
            cycles=slot + self.pe.LATENCY,
        )


def _plan(rng: np.random.Generator, kind: _Kind) -> _Plan:
    """Random sums for every PE, until there are as many MACs in each mode as there should be."""
    slots = max(kind.macs // kind.pes, 2 * _MAX_K)
    while True:
        columns = [_plan_pe(rng, slots, pe, draft=kind.draft) for pe in range(kind.pes)]
        work, is_draft, step = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
        plan = _Plan(work, is_draft, step)
        done = plan.macs()
        if done["verify"] >= kind.macs and (done["draft"] >= kind.macs or not kind.draft):
            return plan
        slots += slots // 8


def _plan_pe(
    rng: np.random.Generator, slots: int, pe: int, *, draft: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns `work`, `draft` and `step` of one PE."""
    count = slots  # as many sums as could be needed
    is_draft = (rng.random(count) < 0.3) & draft
    kind = rng.choice(5, count, p=(0.3, 0.25, 0.35, 0.09, 0.01))
    shortest = np.array([1, 2, 3, 33, 513])[kind]
    longest = np.array([1, 2, 32, 512, _MAX_K])[kind]
    longest = np.where(is_draft, np.minimum(longest, _MAX_K // DRAFT_LANES), longest)
    length = rng.integers(shortest, longest, endpoint=True)
    has_bubbles = rng.random(count) < 0.3
    if pe < _DIRECTED_PES:
        is_draft[:2] = False, draft
        length[:2] = _MAX_K, _MAX_K // DRAFT_LANES
        has_bubbles[:2] = False
    sum_of_slot = np.repeat(np.arange(count), length)[:slots]
    start = np.cumsum(length) - length
    step = np.arange(slots) - start[sum_of_slot]
    bubble = has_bubbles[sum_of_slot] & (step > 0) & (rng.random(slots) < 0.25)
    return ~bubble, is_draft[sum_of_slot], step


def _operands(rng: np.random.Generator, plan: _Plan, pe: Pe) -> _Operands:
    """Operands for the plan, some of which cancel the ones before."""
    shape = plan.step.shape
    extreme = np.zeros(shape, bool)
    extreme[:_DIRECTED_SLOTS, :_EXTREME_PES] = True
    operands = _verify_operands(rng, extreme, pe)
    if pe.has_draft:
        operands = _choose(plan.draft, _draft_operands(rng, extreme, pe), operands)

    cancel = (plan.step > 0) & (rng.random(shape) < 0.15) & ~extreme
    cancel[1:] &= ~cancel[:-1]
    before = _Operands(*(np.roll(values, 1, axis=0) for values in _fields(operands)))
    operands = _choose(cancel, before, operands)
    negate = cancel | (extreme & (np.arange(shape[1]) == 1))
    sign_bit = weight_layout(draft=pe.has_draft)["negative"].offset
    return _Operands(
        operands.weight ^ negate.astype(np.uint64) << np.uint64(sign_bit),
        np.where(plan.work, operands.activation, 0),
        np.where(plan.work, np.where(negate, -operands.factor, operands.factor), 0),
        operands.exponent,
    )


def _fields(operands: _Operands) -> tuple[np.ndarray, ...]:
    return operands.weight, operands.activation, operands.factor, operands.exponent


def _choose(condition: np.ndarray, a: _Operands, b: _Operands) -> _Operands:
    """The operands `a` where the condition holds, else `b`."""
    pairs = zip(_fields(a), _fields(b), strict=True)
    return _Operands(*(np.where(condition, *pair) for pair in pairs))


def _verify_operands(rng: np.random.Generator, extreme: np.ndarray, pe: Pe) -> _Operands:
    """FP16 numbers, weighted with corner cases; the largest ones where `extreme`."""
    numbers = []
    for _ in range(2):
        patterns = rng.integers(0, 1 << 16, extreme.shape)
        patterns ^= np.where(patterns >> 10 & 31 == 31, 0x4000, 0)  # finite
        kind = rng.random(extreme.shape)
        patterns = np.where(kind < 0.2, rng.choice(_CORNERS, extreme.shape), patterns)
        patterns = np.where(kind > 0.9, (patterns & 0x83FF) | 0x3C00, patterns)  # equal exponents
        numbers.append(_take_apart(np.where(extreme, _LARGEST, patterns)))
    w, x = numbers
    weight, activation = dict(w), dict(x)
    # Digits of base 8, -4 to 4.
    place = LANE_BITS * np.arange(DRAFT_LANES)
    padded = (weight.pop("significand") << 1)[..., None] >> place  # the carry below each digit
    negative = padded >> LANE_BITS & 1
    digits = (padded >> 1 & 7) + (padded & 1) - 8 * negative
    weight["codes"] = abs(digits)
    weight["invert"] = (negative[..., :-1] << np.arange(DRAFT_LANES - 1)).sum(-1)
    assert np.array_equal((digits << place).sum(-1), w["significand"])
    magnitude = w["significand"] * x["significand"]
    return _Operands(
        pack(weight_layout(draft=pe.has_draft), weight),
        pack(activation_layout(draft=pe.has_draft), activation),
        np.where(w["negative"] ^ x["negative"], -magnitude, magnitude),
        w["exponent"] + x["exponent"] + PRODUCT_UNIT_EXPONENT,
    )


def _take_apart(patterns: np.ndarray) -> dict[str, np.ndarray]:
    """Operand fields of FP16 numbers: significand * 2^(exponent - 24)."""
    field = patterns >> 10 & 31
    return {
        "significand": patterns & 1023 | np.where(field, 1024, 0),
        "exponent": np.maximum(field - 1, 0),
        "negative": patterns >> 15,
    }


def _draft_operands(rng: np.random.Generator, extreme: np.ndarray, pe: Pe) -> _Operands:
    """Draft codes and block activations; the largest ones where `extreme`."""
    form = pe.config.format
    shape = (*extreme.shape, DRAFT_LANES)
    levels = draft_levels(form)
    q = np.where(extreme[..., None], 7, rng.integers(0, 8, shape))
    magnitude = _weighted(rng, shape, range(_MAX_MAGNITUDE + 1), (0, 1), extreme[..., None])
    w_negative = rng.integers(0, 2, shape) & ~extreme[..., None]
    x_negative = rng.integers(0, 2, shape) & ~extreme[..., None]
    base = _weighted(rng, extreme.shape, range(FP16_MAX_EXPONENT + 1), (0, 1, 29), extreme)
    block = _weighted(rng, extreme.shape, range(1, FP16_MAX_EXPONENT + 1), (1, 2), extreme)
    scale = _weighted(rng, extreme.shape, range(len(SCALE_NUMERATORS)), (), extreme)

    weight = {"codes": q, "exponent": base, "scale": scale}
    activation = {"magnitudes": magnitude, "exponent": block - 1}
    for fields, negative in ((weight, w_negative), (activation, x_negative)):
        fields["negative"] = negative[..., -1]
        inverts = negative[..., :-1] ^ negative[..., -1:]
        fields["invert"] = (inverts << np.arange(DRAFT_LANES - 1)).sum(-1)
    products = np.array([level.value for level in levels])[q] * magnitude
    lane_sum = np.where(w_negative ^ x_negative, -products, products).sum(-1)
    return _Operands(
        pack(weight_layout(draft=True), weight),
        pack(activation_layout(draft=True), activation),
        lane_sum * np.array(SCALE_NUMERATORS)[scale],
        base + form.draft_unit_exponent + block - 1 + _MIN_BLOCK_UNIT,
    )


def _weighted(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    values: range,
    corners: tuple[int, ...],
    extreme: np.ndarray,
) -> np.ndarray:
    """Random values of a range, often a corner or the largest, which it is where `extreme`."""
    corner = rng.choice((*corners, values[-1]), shape)
    chosen = np.where(rng.random(shape) < 0.2, corner, rng.choice(values, shape))
    return np.where(extreme, values[-1], chosen)


def _sums(plan: _Plan, operands: _Operands, pe: Pe) -> np.ndarray:
    """The accumulator after every slot as Python integers, two's complement, [slots, PEs]."""
    limit = 1 << len(pe.drain_out) - 1
    sums = np.empty(plan.step.shape, object)
    shifts = operands.exponent - pe.config.accumulator_unit_exponent
    for pe_index in range(plan.step.shape[1]):
        total = 0
        columns = (values[:, pe_index].tolist() for values in (operands.factor, shifts, plan.step))
        for slot, (factor, shift, step) in enumerate(zip(*columns, strict=True)):
            total = (factor << shift) + (total if step else 0)
            assert -limit <= total < limit, f"slot {slot}, PE {pe_index}: {total:#x} overflows"
            sums[slot, pe_index] = total % (2 * limit)
    return sums


def _integers(words: np.ndarray) -> np.ndarray:
    """Python integers of uint64 [..., 2], the low word first."""
    low, high = words[..., 0].astype(object), words[..., 1].astype(object)
    return high << WORD_BITS | low
