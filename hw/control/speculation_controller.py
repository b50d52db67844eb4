# SPDX-License-Identifier: Apache-2.0
"""The speculation loop: draft, verify, accept, commit (greedy; see `speq.model.speculation`)."""

from __future__ import annotations

from amaranth.hdl import (
    Array,
    Cat,
    Const,
    Elaboratable,
    Module,
    Mux,
    ResetInserter,
    ShapeLike,
    Signal,
    ValueLike,
)
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig, PassKind, pass_layout
from speq.hw.common.ram import Ram
from speq.hw.control.fp32_gap import FP32_INFINITY, Fp32Gap
from speq.hw.control.register_file import status_layout, values_layout
from speq.hw.control.register_map import MAX_RING_LOG2
from speq.hw.memory.memory_writer import write_layout

_COUNT_BITS = 8
_RING_TOKEN_BYTES = 4

#: An alternate of a chain position: how far its logit is below the best; `valid` if it exists.
_OFFER = data.StructLayout({"token": TOKEN_BITS, "gap": 32, "valid": 1})


def speculation_events_layout() -> data.StructLayout:
    """What a cycle adds to the counters of the same names."""
    return data.StructLayout(
        {
            "draft_passes": 1,
            "verify_passes": 1,
            "alternates": _COUNT_BITS,
            "accepted": _COUNT_BITS,
            "alternate_hits": 1,
            "committed": _COUNT_BITS,
        }
    )


class SpeculationController(wiring.Component):
    """Runs the passes of a run and decides, from their rankings, what comes next.

    Without `speculate`: one pass, of kind SINGLE, `pass_rows` rows and at `position`. With it,
    steps as in `speq.model.speculation.generate`, greedy, until `token_limit` tokens are committed
    or the host ends the run:

    1. Draft: up to L = min(draft_length, tokens left - 1) passes of one row, each of which appends
       the best token to the chain. A pass whose second best logit is less than `threshold` below
       the best is the last. (A negative or NaN threshold ends nothing, nor does a ranking of one
       entry.)
    2. The rows that root and chain leave go to alternates, ranks 1 .. choices - 1 of the chain
       positions: those with the smallest gap to the best logit, then the lowest position, then
       rank. A gap with an infinity or NaN is +infinity.
    3. Verify: one pass. Row 0 is the root, row i + 1 chain position i, behind them the alternates
       by position and rank. `row_depth` has each row's position less that of the root, and marks
       alternates as leaves.
    4. Accept: from row 0 on, the row's best token is committed, until it is not among the
       choices at its position, or the row is an alternate.
    5. Commit: every such token goes to the ring in memory, and when all are there, POSITION, ROOT
       and RING_INDEX move on. They are never more than the tokens left, because L is less. Then
       `step_request` until the host has answered.

    A draft length of 0 is plain decoding: verify passes of one row.

    Cycles, without those of passes, writes and the host: 4 from `begin` or the host's answer to the
    first pass. From a draft pass to the next 8 with up to two choices, and 5 for each further one.
    From the last draft pass to the verify pass, with a chain of c and a alternates, about
    (a + 1) (c + 3) + c + 2 a + 18: at most 60 for 8 rows and 1,250 for 64. Behind the verify pass 4
    for each token, and one for each alternate that is compared.

    Flow control: `passes`, `write_command` and `write_data` may stall; the payloads of `passes`
    stay until the next pass. `pass_done` may come from the cycle after the pass was taken on. No
    output depends on an input of the same cycle but two events, on `pass_done`.

    `clear` brings it back to idle at any time (valid may fall); what shows the state of the run,
    up to RING_INDEX and STEP, is kept for the host, also by a reset, and set anew by `begin`.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    begin : In(1)
        Pulse, ignored unless idle: start a run.
    values : In(values_layout(config))
        The registers; POSITION and ROOT are read with `begin`, the others have to be kept.
    passes : Out(stream of pass_layout(config))
    pass_done : In(1)
        Pulse: everything of the pass is finished, and the ranking is there.
    row : Out(row_bits), entries : In(config.ranking_layout)
        Read port of the ranking: entries of `row` in the next cycle (or in the same). `row` is 0
        while a pass is under way.
    write_command, write_data : Out(streams)
        One beat per committed token, of `config.data`.
    write_done : In(1)
        Pulse: the oldest write is in memory.
    step_request : Out(1)
        Level: a step has been committed.
    step_answer, step_finish : In(1)
        Pulse, and whether the run is to end.
    finished : Out(1)
        Pulse: the run has ended.
    row_token, row_depth, pass_status, pass_position, step, ring_index : Out
        The registers ROW_TOKEN, ROW_DEPTH, PASS, PASS_POSITION, STEP and RING_INDEX. In a single
        pass tokens have no meaning, and row i has depth i.
    update : Out(1)
        Pulse: POSITION and ROOT become `position` and `root`.
    position, root : Out
        Entries in the KV cache, and the last committed token.
    events : Out(speculation_events_layout())
    clear : In(1)
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        status, values = status_layout(config), values_layout(config)
        super().__init__(
            {
                "begin": In(1),
                "values": In(values),
                "passes": Out(stream.Signature(pass_layout(config))),
                "pass_done": In(1),
                "row": Out(config.engine.row_bits),
                "entries": In(config.ranking_layout),
                "write_command": Out(stream.Signature(config.data.command_layout)),
                "write_data": Out(stream.Signature(write_layout(config.data))),
                "write_done": In(1),
                "step_request": Out(1),
                "step_answer": In(1),
                "step_finish": In(1),
                "finished": Out(1),
                "row_token": Out(status.members["row_token"]),
                "row_depth": Out(status.members["row_depth"]),
                "pass_status": Out(status.members["pass"]),
                "pass_position": Out(status.members["pass_position"]),
                "step": Out(status.members["step"]),
                "ring_index": Out(status.members["ring_index"]),
                "update": Out(1),
                "position": Out(values.members["position"]),
                "root": Out(TOKEN_BITS),
                "events": Out(speculation_events_layout()),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        r = _Registers(self.config)
        m.submodules.offers = offers = Ram(
            _OFFER.size, self.config.choices * self.config.engine.rows
        )
        m.submodules.gap = gap = Fp32Gap()
        offer = data.View(_OFFER, offers.read_data)
        self._show(m, r)
        self._write_ring(m, r)
        with m.FSM():
            self._run_states(m, r)
            self._pass_states(m, r)
            self._draft_states(m, r, offers, gap)
            self._allot_states(m, r, offers, offer)
            self._row_states(m, r, offers, offer)
            self._accept_states(m, r)
            self._commit_states(m, r)
        return ResetInserter(self.clear)(m)

    def _show(self, m: Module, r: _Registers) -> None:
        """Outputs that are registers."""
        m.d.comb += [
            self.passes.payload.eq(r.now),
            self.row.eq(r.row),
            self.position.eq(r.position),
            self.root.eq(r.root),
            self.ring_index.eq(r.ring_index),
            self.step.eq(r.step),
            self.pass_status.kind.eq(r.now.kind),
            self.pass_status.rows.eq(r.now.rows),
            self.pass_status.index.eq(Mux(r.now.kind == PassKind.DRAFT, r.chain, 0)),
            self.pass_position.eq(r.now.position),
        ]
        for i in range(self.config.engine.rows):
            m.d.comb += [
                self.row_token[i].eq(r.tokens[i]),
                self.row_depth[i].depth.eq(r.depths[i]),
                self.row_depth[i].leaf.eq(r.leaves[i]),
            ]

    def _write_ring(self, m: Module, r: _Registers) -> None:
        """The beat that writes `root` to `slot` of the ring, and the count of those under way."""
        axi, values = self.config.data, self.values
        address = Signal(axi.address_bits)
        strobe = Const(2**_RING_TOKEN_BYTES - 1, axi.beat_bytes)
        lane = Cat(Const(0, _RING_TOKEN_BYTES.bit_length() - 1), r.slot)[: axi.offset_bits]
        beat = Cat(r.root, Const(0, _RING_TOKEN_BYTES * 8 - TOKEN_BITS))
        m.d.comb += [
            address.eq(values.ring + r.slot * _RING_TOKEN_BYTES),
            self.write_command.payload.address.eq(
                Cat(Const(0, axi.offset_bits), address[axi.offset_bits :])
            ),
            self.write_command.payload.beats.eq(1),
            self.write_data.payload.data.eq(beat.replicate(axi.beat_bytes // _RING_TOKEN_BYTES)),
            self.write_data.payload.strobe.eq(strobe << lane),
        ]
        new = self.write_command.valid & self.write_command.ready
        m.d.sync += r.writes.eq(r.writes + new - self.write_done)

    def _run_states(self, m: Module, r: _Registers) -> None:
        """The start of a run, and of a step or the single pass."""
        values = self.values
        with m.State("IDLE"):
            with m.If(self.begin):
                m.d.sync += [
                    r.position.eq(values.position),
                    r.root.eq(values.root),
                    r.ring_index.eq(0),
                    r.step.eq(0),
                ]
                m.next = "START"
        with m.State("START"):
            left = values.token_limit - r.ring_index - 1  # behind the target's own token
            m.d.sync += [
                r.longest.eq(Mux(left < values.draft_length, left, values.draft_length)),
                r.tokens[0].eq(r.root),
                r.row.eq(0),
                *(register.eq(0) for register in (r.chain, r.stop, r.accepted, r.hit_row)),
                *(register.eq(0) for register in (r.committed, *r.counts, *r.leaves)),
                *(depth.eq(i) for i, depth in enumerate(r.depths)),
            ]
            with m.If(values.run.speculate):
                m.next = "PLAN"
            with m.Else():
                r.set_pass(m, PassKind.SINGLE, values.pass_rows, r.position)
                m.next = "PASS"

    def _pass_states(self, m: Module, r: _Registers) -> None:
        """A pass, and where to go on behind it."""
        with m.State("PASS"):
            m.d.comb += self.passes.valid.eq(1)
            with m.If(self.passes.ready):
                m.next = "WAIT"
        with m.State("WAIT"):
            with m.If(self.pass_done):
                with m.Switch(r.now.kind):
                    with m.Case(PassKind.SINGLE):
                        m.next = "FINISH"
                    with m.Case(PassKind.DRAFT):
                        m.d.comb += self.events.draft_passes.eq(1)
                        m.d.sync += [r.rank.eq(1), r.elapsed.eq(0)]
                        m.next = "MEASURE"
                    with m.Default():
                        m.d.comb += self.events.verify_passes.eq(1)
                        m.next = "READ"

    def _draft_states(self, m: Module, r: _Registers, offers: Ram, gap: Fp32Gap) -> None:
        """Draft passes: the best token to the chain, the others with their gaps to the offers."""
        best = self.entries[0]
        other = Signal(self.config.ranked_layout)
        m.d.comb += [
            other.eq(Array(self.entries[i] for i in range(self.config.choices))[r.rank]),
            gap.best.eq(best.logit),
            gap.other.eq(other.logit),
            offers.write_address.eq(Cat((r.rank - 1)[: len(r.rank)], r.chain)),
            offers.write_data.eq(Cat(other.token, gap.gap, other.valid)),
        ]
        with m.State("PLAN"):
            with m.If((r.chain < r.longest) & ~r.stop):
                r.set_pass(m, PassKind.DRAFT, 1, r.position + r.chain)
                m.next = "PASS"
            with m.Else():
                m.d.sync += [
                    r.tokens[0].eq(r.root),
                    r.used.eq(r.chain + 1),
                    r.free.eq(self.config.engine.rows - 1 - r.chain),
                ]
                m.next = "ALLOT"
        with m.State("MEASURE"):
            m.d.sync += r.elapsed.eq(r.elapsed + 1)
            with m.If(r.elapsed == gap.LATENCY):
                m.d.comb += offers.write_enable.eq(1)
                m.d.sync += [r.rank.eq(r.rank + 1), r.elapsed.eq(0)]
                with m.If(r.rank == 1):
                    threshold = self.values.threshold
                    below = (threshold <= FP32_INFINITY) & (gap.gap < threshold)
                    m.d.sync += r.stop.eq(other.valid & below)
                with m.If(r.rank + 1 >= self.values.choices):
                    m.d.sync += [
                        r.tokens[0].eq(best.token),
                        r.tokens[r.chain + 1].eq(best.token),
                        r.chain.eq(r.chain + 1),
                    ]
                    m.next = "PLAN"

    def _allot_states(self, m: Module, r: _Registers, offers: Ram, offer: data.View) -> None:
        """Alternates for the free rows. Each goes to the position whose next offer has the smallest
        gap: gaps rise with the rank, so nothing better is behind it."""
        seen = Signal()  # that `offer` is the next one of position `seen_place`
        seen_place = Signal.like(r.place)
        found = Signal()
        least = Signal(32, reset_less=True)
        least_place = Signal.like(r.place)
        with m.State("ALLOT"):
            m.d.sync += [r.place.eq(0), r.rank.eq(0), found.eq(0)]
            with m.If(r.free == 0):
                m.next = "ROWS"
            with m.Else():
                m.next = "SCAN"
        with m.State("SCAN"):
            taken = r.counts[r.place]
            m.d.comb += [
                offers.read_enable.eq(1),
                offers.read_address.eq(Cat(taken, r.place)),
            ]
            m.d.sync += [
                r.place.eq(r.place + 1),
                seen.eq((r.place != r.chain) & (taken + 1 != self.values.choices)),
                seen_place.eq(r.place),
            ]
            with m.If(seen & offer.valid & (~found | (offer.gap < least))):
                m.d.sync += [found.eq(1), least.eq(offer.gap), least_place.eq(seen_place)]
            with m.If(r.place == r.chain):
                m.next = "GRANT"
        with m.State("GRANT"):
            count = r.counts[least_place]
            with m.If(found):
                m.d.sync += [count.eq(count + 1), r.free.eq(r.free - 1)]
                m.next = "ALLOT"
            with m.Else():
                m.d.sync += r.place.eq(0)
                m.next = "ROWS"

    def _row_states(self, m: Module, r: _Registers, offers: Ram, offer: data.View) -> None:
        """The rows of the alternates, and the verify pass."""
        with m.State("ROWS"):
            with m.If(r.place == r.chain):
                r.set_pass(m, PassKind.VERIFY, r.used, r.position)
                m.next = "PASS"
            with m.Elif(r.rank == r.counts[r.place]):
                m.d.sync += [r.place.eq(r.place + 1), r.rank.eq(0)]
            with m.Else():
                m.d.comb += [
                    offers.read_enable.eq(1),
                    offers.read_address.eq(Cat(r.rank, r.place)),
                ]
                m.next = "ALTERNATE"
        with m.State("ALTERNATE"):
            m.d.sync += [
                r.tokens[r.used].eq(offer.token),
                r.depths[r.used].eq(r.place + 1),
                r.leaves[r.used].eq(1),
                r.used.eq(r.used + 1),
                r.rank.eq(r.rank + 1),
            ]
            m.next = "ROWS"

    def _accept_states(self, m: Module, r: _Registers) -> None:
        """The walk from row 0 on. A row's choices are at the depth behind its own: the next of
        the chain, if there is one, and alternates."""
        with m.State("READ"):
            m.next = "TAKE"
        with m.State("TAKE"):
            values = self.values
            last = Cat(i < values.ring_log2 for i in range(MAX_RING_LOG2))  # slot of the ring
            m.d.sync += [
                r.root.eq(self.entries[0].token),
                r.slot.eq((r.ring_index + r.committed) & last),
                r.committed.eq(r.committed + 1),
                r.candidate.eq(r.committed + 1),
            ]
            m.next = "WRITE"
        with m.State("WRITE"):
            command, beat = self.write_command, self.write_data
            m.d.comb += [command.valid.eq(~r.command_taken), beat.valid.eq(~r.beat_taken)]
            command_taken = r.command_taken | command.ready
            beat_taken = r.beat_taken | beat.ready
            m.d.sync += [r.command_taken.eq(command_taken), r.beat_taken.eq(beat_taken)]
            with m.If(command_taken & beat_taken):
                m.d.sync += [r.command_taken.eq(0), r.beat_taken.eq(0)]
                with m.If((r.hit_row != 0) | (r.committed > r.chain)):
                    m.next = "DRAIN"
                with m.Else():
                    m.next = "MATCH"
        with m.State("MATCH"):
            candidate = r.candidate[: len(r.row)]
            leaf = r.leaves[candidate]
            m.d.sync += r.candidate.eq(Mux(leaf, r.candidate, r.chain) + 1)
            with m.If(r.candidate == r.used):
                m.next = "DRAIN"
            with m.Elif((r.tokens[candidate] == r.root) & (r.depths[candidate] == r.committed)):
                m.d.sync += r.row.eq(candidate)
                with m.If(leaf):
                    m.d.sync += r.hit_row.eq(candidate)
                with m.Else():
                    m.d.sync += r.accepted.eq(r.accepted + 1)
                m.next = "READ"

    def _commit_states(self, m: Module, r: _Registers) -> None:
        """The end of a step, and of a run."""
        with m.State("DRAIN"):
            with m.If(r.writes == 0):
                m.d.sync += [
                    r.ring_index.eq(r.ring_index + r.committed),
                    r.position.eq(r.position + r.committed),
                    r.step.committed.eq(r.committed),
                    r.step.accepted.eq(r.accepted),
                    r.step.hit_row.eq(r.hit_row),
                    r.step.chain.eq(r.chain),
                ]
                m.next = "COMMIT"
        with m.State("COMMIT"):
            m.d.comb += [
                self.update.eq(1),
                self.events.alternates.eq(r.used - 1 - r.chain),
                self.events.accepted.eq(r.accepted),
                self.events.alternate_hits.eq(r.hit_row != 0),
                self.events.committed.eq(r.committed),
            ]
            m.next = "STEP"
        with m.State("STEP"):
            m.d.comb += self.step_request.eq(1)
            with m.If(self.step_answer):
                with m.If(self.step_finish | (r.ring_index >= self.values.token_limit)):
                    m.next = "FINISH"
                with m.Else():
                    m.next = "START"
        with m.State("FINISH"):
            m.d.comb += self.finished.eq(1)
            m.next = "IDLE"


class _Registers:
    """What the states share. Only writes under way are reset; the rest is set before its use."""

    def __init__(self, config: AcceleratorConfig) -> None:
        rows, count_bits = config.engine.rows, config.engine.token_bits
        rank_bits = (config.choices - 1).bit_length()
        status, values = status_layout(config).members, values_layout(config).members

        def register(shape: ShapeLike, name: str) -> Signal:
            return Signal(shape, name=name, reset_less=True)

        def registers(shape: ShapeLike, name: str, count: int) -> Array:
            return Array(register(shape, f"{name}_{i}") for i in range(count))

        # The run.
        self.position = register(values["position"], "position")
        self.root = register(TOKEN_BITS, "root")
        self.ring_index = register(status["ring_index"], "ring_index")
        self.now = register(pass_layout(config), "now")  # the pass
        self.step = register(status["step"], "step")
        # Rows of the pass.
        self.tokens = registers(TOKEN_BITS, "token", rows)
        self.depths = registers(_COUNT_BITS, "depth", rows)
        self.leaves = registers(1, "leaf", rows)
        # The step: rows that have their tokens, those left, alternates by chain position.
        self.longest = register(count_bits, "longest")
        self.chain = register(count_bits, "chain")
        self.stop = register(1, "stop")
        self.used = register(count_bits, "used")
        self.free = register(count_bits, "free")
        self.counts = registers(rank_bits, "count", rows)
        self.accepted = register(count_bits, "accepted")
        self.hit_row = register(count_bits, "hit_row")
        self.committed = register(count_bits, "committed")
        # Indices.
        self.place = register(count_bits, "place")
        self.rank = register(rank_bits, "rank")
        self.row = register(config.engine.row_bits, "row")
        self.candidate = register(count_bits, "candidate")
        self.elapsed = register(range(Fp32Gap.LATENCY + 1), "elapsed")
        # Writes to the ring: the slot, what was taken of the one on offer, those under way.
        self.slot = register(MAX_RING_LOG2, "slot")
        self.command_taken = Signal()
        self.beat_taken = Signal()
        self.writes = Signal(range(rows + 1))

    def set_pass(self, m: Module, kind: PassKind, rows: ValueLike, position: ValueLike) -> None:
        """Set the pass."""
        m.d.sync += [
            self.now.kind.eq(kind),
            self.now.rows.eq(rows),
            self.now.position.eq(position),
        ]
