# SPDX-License-Identifier: Apache-2.0
"""The best outputs of each row, found while the results of a GEMM pass by."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.common.logic import any_of, pipeline_stage
from speq.hw.common.ram import Ram

#: The order key of minus infinity.
_LEAST = 0x007F_FFFF
_KEY_BITS = 32
#: A key, below a bit that says that there is one.
_RANK_BITS = _KEY_BITS + 1


def rank_start_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A GEMM whose results are to be ranked: how many rows it has, the number of its first tile,
    and the columns that count. With `keep` the entries of the GEMM before stay. With `whole` all
    entries of all rows are wanted, otherwise those of row 0 and the first of the others."""
    return data.StructLayout(
        {
            "tokens": config.engine.token_bits,
            "tile": config.tile_number_bits,
            "columns": config.engine.cols,
            "keep": 1,
            "whole": 1,
        }
    )


def order_key(logit: Value) -> Value:
    """32 bits that, as unsigned numbers, are ordered as the FP32 numbers `logit` are.

    NaN counts as minus infinity, and both zeros are equal. No key is 0.
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

    With `truncate` only outputs count whose logit, which is not what they are ranked by, is not
    below the row's cut-off. This rises with the largest logit, from beat to beat, and the last one
    decides. So a beat first removes the entries that its cut-off leaves out; then all its columns
    that reach it are inserted. What is *lost*, because a list is full of better outputs, may be
    missed when others are removed later. `missed` says whether any wanted entry may be wrong for
    that. It is told by three numbers for each row, which are exact bounds:

    - `lost`, the largest logit of what has been lost. If it is below the cut-off, all of it is
      below this one and all later ones, so that it counts for nothing and is forgotten.
    - `floor`, the largest that a last entry was when something was lost. All that has been lost is
      ranked behind the entry that `floor` is of.
    - `strict`, whether an entry has been removed since. If none has, what is ranked as `floor` is
      in front of all that has been lost, else only what exceeds it.

    So an entry that is in front of `floor` in this sense has no lost output before it. It is right,
    with all those before it: of outputs that reach the last cut-off, which all reached the earlier
    and lower ones, only lost ones are not in the list. The last entry that is wanted of a row is
    asked for this, if `lost` reaches the cut-off. With as many outputs as entries or fewer nothing
    is lost. If the cut-offs of a second GEMM with the same results are the last ones of the first
    from its first beat on, nothing is ever removed, and its ranking is right.

    Flow control: the results may stall in any cycle and must keep the beat on offer until it is
    taken, and `logits` and `cutoff` with it. A beat takes `CYCLES` cycles if no column exceeds the
    last entry, otherwise `INSERT_CYCLES` and one for each that does; with `truncate` all strobed
    columns do, each removed entry takes another cycle, and `TRUNCATE_CYCLES` come on top. A start
    is taken only between GEMMs, and without `keep` drops the entries of the one before: they must
    have been read by then. Results wait for their start.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    start : In(stream of rank_start_layout(config))
        One for each GEMM.
    results : In(stream of gemm_engine.result_layout(config.engine))
    truncate : In(1)
        Constant while busy.
    logits : In(ArrayLayout(32, cols)), cutoff : In(32)
        With a beat, if `truncate`: FP32 logits of the columns, and the order key of the row's
        cut-off, which never falls, or 0.
    busy : Out(1)
        From the cycle after a start until the GEMM's last beat has been ranked.
    missed : Out(1)
        Whether a wanted entry may be wrong; unless busy.
    row : In(range(rows))
    entries : Out(config.ranking_layout)
        Those of `row` in the cycle before, unless it was busy then.
    """

    #: Cycles from seeing a beat to seeing the next one, if nothing is inserted.
    CYCLES = 3
    #: The same if something is, less one for each.
    INSERT_CYCLES = CYCLES + 4
    #: What truncation adds.
    TRUNCATE_CYCLES = 5
    #: Cycles from `row` to `entries`.
    LATENCY = 1

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        #: An entry with the kind of what it is ranked by, and its logit's order key.
        self._kept = data.StructLayout(
            {"entry": config.ranked_layout, "kind": 2, "logit_key": _KEY_BITS}
        )
        super().__init__(
            {
                "start": In(stream.Signature(rank_start_layout(config))),
                "results": In(stream.Signature(result_layout(config.engine))),
                "truncate": In(1),
                "logits": In(data.ArrayLayout(_KEY_BITS, config.engine.cols)),
                "cutoff": In(_KEY_BITS),
                "busy": Out(1),
                "missed": Out(1),
                "row": In(config.engine.row_bits),
                "entries": Out(config.ranking_layout),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        engine = config.engine
        beat = self.results.payload
        row_layout = data.StructLayout(
            {
                "kept": data.ArrayLayout(self._kept, config.choices),
                "lost": _KEY_BITS,
                "floor": _KEY_BITS,
                "strict": 1,
            }
        )
        m.submodules.ram = ram = Ram(row_layout.size, max(2, engine.rows))

        running = self.busy
        tokens = Signal(engine.token_bits, reset_less=True)
        tile = Signal(config.tile_number_bits, reset_less=True)
        columns = Signal(engine.cols, reset_less=True)
        whole = Signal(reset_less=True)
        touched = Signal(engine.rows)  # rows that have entries
        missed = Signal(engine.rows)
        m.d.comb += [self.start.ready.eq(~running), self.missed.eq(missed.any())]
        with m.If(self.start.valid & self.start.ready):
            m.d.sync += [
                running.eq(1),
                tokens.eq(self.start.payload.tokens),
                tile.eq(self.start.payload.tile),
                columns.eq(self.start.payload.columns),
                whole.eq(self.start.payload.whole),
            ]
            with m.If(~self.start.payload.keep):
                m.d.sync += [touched.eq(0), missed.eq(0)]

        # The row's entries are read from the RAM, changed, and written back.
        read_row = Signal(engine.row_bits)
        was_touched = Signal(reset_less=True)
        stored = data.View(row_layout, ram.read_data)
        m.d.comb += [
            read_row.eq(Mux(running, beat.row, self.row)),
            ram.read_address.eq(read_row),
            ram.write_address.eq(beat.row),
        ]
        with m.If(ram.read_enable):
            m.d.sync += was_touched.eq(touched.bit_select(read_row, 1))
        found = Signal(row_layout)
        m.d.comb += found.eq(stored)
        with m.If(~was_touched):
            m.d.comb += [found.lost.eq(0), found.floor.eq(0)]
        for entry, kept, read in zip(self.entries, found.kept, stored.kept, strict=True):
            m.d.comb += [
                kept.entry.valid.eq(read.entry.valid & was_touched),
                entry.eq(kept.entry),
            ]

        # The comparison of all columns with the last entry does not wait for the RAM.
        last_ranks = Array(
            Signal(_RANK_BITS, name=f"last_rank_{row}", reset_less=True)
            for row in range(engine.rows)
        )
        has_last = touched.bit_select(beat.row, 1).replicate(_RANK_BITS)
        (last_rank,) = pipeline_stage(m, 0, last_rank=last_ranks[beat.row] & has_last)
        keys = [
            pipeline_stage(m, 0, **{f"key_{i}": order_key(value)})[0]
            for i, value in enumerate(beat.data)
        ]

        state = Signal(row_layout, reset_less=True)
        best = state.kept
        # What the entries are ranked by, known at once.
        ranks = [
            Signal(_RANK_BITS, name=f"rank_{i}", reset_less=True) for i in range(config.choices)
        ]
        pending = Signal(engine.cols)  # columns to be inserted
        below = Signal(config.choices)  # entries to be removed
        dropped = Signal(reset_less=True)  # in this beat
        m.d.comb += ram.write_data.eq(state)
        takes = Signal()
        inserting = self._insert(m, state, ranks, takes, pending, tile, dropped)
        with m.FSM():
            with m.State("READ"):
                m.d.comb += ram.read_enable.eq(~running | self.results.valid)
                with m.If(running & self.results.valid):
                    m.next = "COMPARE"
            with m.State("COMPARE"):
                m.d.sync += [state.eq(found), dropped.eq(0)]
                for rank, kept in zip(ranks, found.kept, strict=True):
                    m.d.sync += rank.eq(_rank(kept))
                for i, key in enumerate(keys):
                    exceeds = self.truncate | (Cat(key, Const(1, 1)) > last_rank)
                    m.d.sync += pending[i].eq(beat.strobe[i] & columns[i] & exceeds)
                m.next = "INSERT"
                with m.If(self.truncate):
                    m.next = "BELOW"
            with m.State("BELOW"):
                for i, kept in enumerate(best):
                    m.d.sync += below[i].eq(kept.entry.valid & (kept.logit_key < self.cutoff))
                with m.If(state.lost < self.cutoff):
                    m.d.sync += [state.lost.eq(0), state.floor.eq(0)]
                m.next = "REMOVE"
            with m.State("REMOVE"):
                for i in range(config.choices):
                    with m.If(below[: i + 1].any()):
                        if i + 1 < config.choices:
                            m.d.sync += [best[i].eq(best[i + 1]), ranks[i].eq(ranks[i + 1])]
                            m.d.sync += below[i].eq(below[i + 1])
                        else:
                            m.d.sync += [best[i].entry.valid.eq(0), ranks[i].eq(0), below[i].eq(0)]
                with m.If(below.any()):
                    m.d.sync += state.strict.eq(1)
                with m.Else():
                    m.next = "INSERT"
            with m.State("INSERT"):
                m.d.comb += takes.eq(pending.any())
                m.d.sync += pending.eq(pending & (pending - 1))
                with m.If(~takes & ~inserting):
                    with m.If(self.truncate):
                        m.next = "BOUND"
                    with m.Else():
                        self._write(m, ram, ranks, last_ranks, tokens, tile, touched)
                        m.next = "READ"
            with m.State("BOUND"):
                with m.If(dropped & (ranks[-1][:_KEY_BITS] > state.floor)):
                    m.d.sync += [state.floor.eq(ranks[-1]), state.strict.eq(0)]
                m.next = "JUDGE"
            judged = Mux(whole | (beat.row == 0), ranks[-1], ranks[0])
            floor = Cat(state.floor, Const(1, 1))
            with m.State("JUDGE"):
                is_right = (state.lost < self.cutoff) | (judged > floor)
                is_right |= (judged == floor) & ~state.strict
                m.d.sync += missed.bit_select(beat.row, 1).eq(~is_right)
                m.next = "WRITE"
            with m.State("WRITE"):
                self._write(m, ram, ranks, last_ranks, tokens, tile, touched)
                m.next = "READ"
        return m

    def _write(
        self,
        m: Module,
        ram: Ram,
        ranks: list[Signal],
        last_ranks: Array,
        tokens: Signal,
        tile: Signal,
        touched: Signal,
    ) -> None:
        """The beat's last cycle."""
        beat = self.results.payload
        m.d.comb += [self.results.ready.eq(1), ram.write_enable.eq(1)]
        m.d.sync += [
            last_ranks[beat.row].eq(ranks[-1]),
            touched.bit_select(beat.row, 1).eq(1),
        ]
        with m.If(beat.row + 1 == tokens):
            m.d.sync += tile.eq(tile + 1)
        with m.If(beat.last):
            m.d.sync += self.busy.eq(0)

    def _insert(
        self,
        m: Module,
        state: data.View,
        ranks: list[Signal],
        takes: Signal,
        pending: Signal,
        tile: Signal,
        dropped: Signal,
    ) -> Value:
        """Bring the lowest pending column into the list, five cycles after it is taken; whether one
        is on its way."""
        config, beat = self.config, self.results.payload
        column_bits = (config.engine.cols - 1).bit_length()
        under_way = Signal(4)

        # Stages 1 and 2: its value and its logit.
        m.d.sync += under_way.eq(Cat(takes, under_way))
        (lowest,) = pipeline_stage(m, 1, lowest=(pending & -pending)[: len(pending)])
        column = any_of(bit.replicate(column_bits) & i for i, bit in enumerate(lowest))
        token, value, logit = pipeline_stage(
            m,
            2,
            token=Cat(column[:column_bits], tile),
            value=_chosen(lowest, beat.data),
            logit=_chosen(lowest, self.logits),
        )

        # Stages 3 and 4: their keys, and whether it reaches the cut-off.
        kind = _kind(value)
        token, value, kind, rank, logit_key = pipeline_stage(
            m,
            3,
            token=token,
            value=value,
            kind=kind,
            rank=Cat(_key(value, kind), Const(1, 1)),
            logit_key=order_key(logit),
        )
        candidate = Signal(self._kept, reset_less=True)
        candidate_rank = Signal(_RANK_BITS, reset_less=True)
        enters = Signal()
        m.d.sync += [
            enters.eq(under_way[2] & (~self.truncate | (logit_key >= self.cutoff))),
            candidate.entry.valid.eq(1),
            candidate.entry.token.eq(token),
            candidate.entry.logit.eq(value),
            candidate.kind.eq(kind),
            candidate.logit_key.eq(logit_key),
            candidate_rank.eq(rank),
        ]

        # Stage 5: before the first entry that is worse.
        best = state.kept
        better = Cat(candidate_rank > rank for rank in ranks)
        for i in range(config.choices):
            with m.If(enters & better[i]):
                if i:
                    # Entries are sorted, so that this one moves if the one before does.
                    m.d.sync += [
                        best[i].eq(Mux(better[i - 1], best[i - 1], candidate)),
                        ranks[i].eq(Mux(better[i - 1], ranks[i - 1], candidate_rank)),
                    ]
                else:
                    m.d.sync += [best[i].eq(candidate), ranks[i].eq(candidate_rank)]

        # What is lost for that, a cycle later.
        is_lost = Signal()
        m.d.sync += is_lost.eq(enters & ranks[-1][-1] & self.truncate)
        (lost_key,) = pipeline_stage(
            m, 6, lost=Mux(better[-1], best[-1].logit_key, candidate.logit_key)
        )
        with m.If(is_lost):
            m.d.sync += dropped.eq(1)
            with m.If(lost_key > state.lost):
                m.d.sync += state.lost.eq(lost_key)
        return under_way.any() | is_lost


def _rank(kept: data.View) -> Value:
    """A number that is larger for a better entry; one that is not valid is below all."""
    key = _key(kept.entry.logit, kept.kind)
    return Cat(key, Const(1, 1)) & kept.entry.valid.replicate(_RANK_BITS)


def _chosen(choice: Value, values: data.View) -> Value:
    """The value whose bit is set."""
    return any_of(bit.replicate(len(v)) & v for bit, v in zip(choice, values, strict=True))
