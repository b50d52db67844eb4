# SPDX-License-Identifier: Apache-2.0
"""The best outputs of each row, found while the results of a GEMM pass by."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.common.logic import any_of
from speq.hw.common.ram import Ram

#: The order key of minus infinity.
_LEAST = 0x007F_FFFF


def rank_start_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A GEMM whose results are to be ranked: how many rows it has, the number of its first tile,
    and the columns that count. With `keep` the entries of the GEMM before stay."""
    return data.StructLayout(
        {
            "tokens": config.engine.token_bits,
            "tile": config.tile_number_bits,
            "columns": config.engine.cols,
            "keep": 1,
        }
    )


def order_key(logit: Value) -> Value:
    """32 bits that, as unsigned numbers, are ordered as the FP32 numbers `logit` are.

    NaN counts as minus infinity, and both zeros are equal.
    """
    return _key(logit, _kind(logit))


def _kind(logit: Value) -> Value:
    """What of a logit's order key takes long to find: whether it is NaN, and below 0 else."""
    magnitude, negative = logit[:31], logit[31]
    is_nan = magnitude[23:].all() & magnitude[:23].any()
    return Cat(is_nan, negative & magnitude.any() & ~is_nan)


def _key(logit: Value, kind: Value) -> Value:
    """The order key of a logit of this kind."""
    is_nan, is_below = kind[0], kind[1]
    return Mux(is_nan, _LEAST, Cat(logit[:31] ^ is_below.replicate(31), ~is_below))


class Ranker(wiring.Component):
    """Rank the FP32 results of a GEMM: keep the `config.choices` largest of each row.

    The largest comes first; of equal ones the lowest index. NaN ranks as minus infinity and ties
    with it, but keeps its bits; -0 and +0 tie. Index i * cols + c is column c of tile i; tiles come
    in rising order, each with one beat for each row, 0 to tokens - 1. Only strobed columns count
    that are among the start's. With `keep`, the tiles must come behind those of the GEMM before.
    Where a row has fewer outputs, or none because it is not below `tokens`, the rest of its
    entries is not valid.

    All columns are compared with the row's last entry at once; those that exceed it are inserted
    one after the other, lowest index first, if they still exceed it.

    Flow control: the results may stall in any cycle and must keep the beat on offer until it is
    taken. A beat takes `CYCLES` cycles if no column exceeds the last entry, otherwise
    `INSERT_CYCLES` and one for each that does. A start is taken only between GEMMs, and without
    `keep` drops the entries of the one before: they must have been read by then. Results wait for
    their start.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    start : In(stream of rank_start_layout(config))
        One for each GEMM.
    results : In(stream of gemm_engine.result_layout(config.engine))
    busy : Out(1)
        From the cycle after a start until the GEMM's last beat has been ranked.
    row : In(range(rows))
    entries : Out(config.ranking_layout)
        Those of `row` in the cycle before, unless it was busy then.
    """

    #: Cycles from seeing a beat to seeing the next one, if nothing is inserted.
    CYCLES = 3
    #: The same if something is, less one for each.
    INSERT_CYCLES = CYCLES + 2
    #: Cycles from `row` to `entries`.
    LATENCY = 1

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        #: An entry with the kind of its logit.
        self._kept = data.StructLayout({"entry": config.ranked_layout, "kind": 2})
        super().__init__(
            {
                "start": In(stream.Signature(rank_start_layout(config))),
                "results": In(stream.Signature(result_layout(config.engine))),
                "busy": Out(1),
                "row": In(config.engine.row_bits),
                "entries": Out(config.ranking_layout),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        engine = config.engine
        beat = self.results.payload
        kept_layout = data.ArrayLayout(self._kept, config.choices)
        m.submodules.ram = ram = Ram(kept_layout.size, max(2, engine.rows))

        running = self.busy
        tokens = Signal(engine.token_bits, reset_less=True)
        column_bits = (engine.cols - 1).bit_length()
        tile = Signal(config.tile_number_bits, reset_less=True)
        columns = Signal(engine.cols, reset_less=True)
        touched = Signal(engine.rows)  # rows that have entries
        m.d.comb += self.start.ready.eq(~running)
        with m.If(self.start.valid & self.start.ready):
            m.d.sync += [
                running.eq(1),
                tokens.eq(self.start.payload.tokens),
                tile.eq(self.start.payload.tile),
                columns.eq(self.start.payload.columns),
            ]
            with m.If(~self.start.payload.keep):
                m.d.sync += touched.eq(0)

        # The row's entries are read from the RAM, changed, and written back.
        read_row = Signal(engine.row_bits)
        was_touched = Signal(reset_less=True)
        stored = data.View(kept_layout, ram.read_data)
        m.d.comb += [
            read_row.eq(Mux(running, beat.row, self.row)),
            ram.read_address.eq(read_row),
            ram.write_address.eq(beat.row),
        ]
        with m.If(ram.read_enable):
            m.d.sync += was_touched.eq(touched.bit_select(read_row, 1))
        found = Signal(kept_layout)
        for entry, read, kept in zip(self.entries, stored, found, strict=True):
            m.d.comb += [
                kept.eq(read),
                kept.entry.valid.eq(read.entry.valid & was_touched),
                entry.eq(kept.entry),
            ]

        best = Signal(kept_layout, reset_less=True)
        pending = Signal(engine.cols)  # columns to be inserted
        lowest = Signal(engine.cols)  # the first of them
        picked = Signal(config.ranked_layout)
        candidate = Signal(self._kept)  # the same with its kind
        m.d.comb += ram.write_data.eq(best)
        m.d.sync += [
            picked.valid.eq(0),
            candidate.entry.eq(picked),
            candidate.kind.eq(_kind(picked.logit)),
        ]
        with m.If(candidate.entry.valid):
            self._insert(m, best, candidate)
        with m.FSM():
            with m.State("READ"):
                m.d.comb += ram.read_enable.eq(~running | self.results.valid)
                with m.If(running & self.results.valid):
                    m.next = "COMPARE"
            with m.State("COMPARE"):
                least = self._rank(found[config.choices - 1])
                m.d.sync += best.eq(found)
                for column, logit in enumerate(beat.data):
                    exceeds = Cat(order_key(logit), Const(1, 1)) > least
                    m.d.sync += pending[column].eq(beat.strobe[column] & columns[column] & exceeds)
                m.next = "INSERT"
            with m.State("INSERT"):
                m.d.comb += lowest.eq(pending & -pending)
                column = any_of(bit.replicate(column_bits) & i for i, bit in enumerate(lowest))
                logits = zip(lowest, beat.data, strict=True)
                m.d.sync += [
                    pending.eq(pending & ~lowest),
                    picked.valid.eq(pending.any()),
                    picked.token.eq(Cat(column[:column_bits], tile)),
                    picked.logit.eq(any_of(bit.replicate(32) & logit for bit, logit in logits)),
                ]
                with m.If(~pending.any() & ~picked.valid & ~candidate.entry.valid):
                    m.d.comb += [self.results.ready.eq(1), ram.write_enable.eq(1)]
                    m.d.sync += touched.bit_select(beat.row, 1).eq(1)
                    with m.If(beat.row + 1 == tokens):
                        m.d.sync += tile.eq(tile + 1)
                    with m.If(beat.last):
                        m.d.sync += running.eq(0)
                    m.next = "READ"
        return m

    def _rank(self, kept: data.View) -> Value:
        """A number that is larger for a better entry; one that is not valid is below all."""
        key = _key(kept.entry.logit, kept.kind)
        return Cat(key, Const(1, 1)) & kept.entry.valid.replicate(33)

    def _insert(self, m: Module, best: data.View, candidate: data.View) -> None:
        """Put the candidate before the first entry that is worse, and drop the last."""
        rank = self._rank(candidate)
        better = Cat(rank > self._rank(kept) for kept in best)
        for i in range(self.config.choices):
            with m.If(better[i]):
                if i:
                    # Entries are sorted, so that this one moves if the one before does.
                    m.d.sync += best[i].eq(Mux(better[i - 1], best[i - 1], candidate))
                else:
                    m.d.sync += best[i].eq(candidate)
