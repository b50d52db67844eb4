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
    Shape,
    ShapeLike,
    Signal,
    Value,
    ValueLike,
    signed,
)
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig, PassKind, pass_layout
from speq.hw.common.ieee754 import FP32_INFINITY
from speq.hw.common.logic import pipeline_stage
from speq.hw.common.ram import Ram
from speq.hw.control.fp32_gap import Fp32Gap
from speq.hw.control.ngram_matcher import NgramMatcher
from speq.hw.control.register_file import status_layout, values_layout
from speq.hw.control.register_map import GAP_COSTS, MAX_RING_LOG2
from speq.hw.memory.memory_writer import write_layout

_COUNT_BITS = 8
_RING_TOKEN_BYTES = 4

#: Half octaves of FP32: the bits above these are the exponent and the top bit of the fraction.
_HALF_OCTAVE_LOW = 22
#: The half octave with index 0 in a table of costs, which begins at 2^-3.
_FIRST_HALF_OCTAVE = 2 * (127 - 3)

_COST_BITS = 8
#: The cost of what is never guessed.
_NO_GUESS = 2**_COST_BITS - 1
#: Cycles from a draft pass's ranking to the cost of its second entry.
_FIRST_COST = Fp32Gap.LATENCY + 3
#: Tokens that a guess needs to make a step without draft passes.
_SHORTEST_FREE_GUESS = 3


class Origin(enum.Enum, shape=2):
    """Where a row's token is from, with the values of ROW_PLACE.origin."""

    CHAIN = 0
    ALTERNATE = 1
    GUESS = 2


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
            "guesses": _COUNT_BITS,
            "guess_hits": _COUNT_BITS,
            "free_steps": 1,
        }
    )


def _key_bits(config: AcceleratorConfig) -> int:
    """Bits of the cost of a path, which has at most as many tokens as there are rows."""
    return (config.engine.rows * (2**_COST_BITS - 1)).bit_length()


def _alternate_layout(config: AcceleratorConfig) -> data.StructLayout:
    """An alternate that a chain position offers: what its path costs; `valid` if it exists."""
    return data.StructLayout({"token": TOKEN_BITS, "key": _key_bits(config), "valid": 1})


def _guess_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A guess that a row offers: what its path costs, where its token is in the history, and what
    each of its tokens costs."""
    return data.StructLayout(
        {"key": _key_bits(config), "next": config.history_bits, "cost": _COST_BITS}
    )


class SpeculationController(wiring.Component):
    """Runs the passes of a run and decides, from their rankings, what comes next.

    Without `speculate`: one pass, of kind SINGLE, `pass_rows` rows and at `position`. With it,
    first such passes of as many rows as there are, as long as POSITION, which each moves on, is
    less than `prompt_end`: they fill the KV cache up to there. Then steps as in
    `speq.model.speculation.generate`, greedy, until `token_limit` tokens or one of the first
    `stop_tokens` elements of `stop_token` are committed or the host ends the run. Costs are -log2
    of probabilities in sixteenths of a bit, from the tables in the registers; the cost of a path is
    the sum of its tokens'. In the tables by logit gap, its FP32 exponent and the top bit of its
    fraction are the index, counted from 2^-3 on: 0 below 0.1875, 15 from 24 on. A gap with an
    infinity or NaN, or to an entry that does not exist, is +infinity.

    1. Guess: if `guess_limit` allows it, the root is looked for in the history. If it has a match
       that costs less, with at least three tokens behind it, there is no draft.
    2. Draft: up to L = min(draft_length, tokens left - 1) passes of one row, each of which appends
       the best token to the chain. A pass is the last whose second best logit is less than
       `threshold` below the best, or with which the chain costs more than `cost_limit`. (A negative
       or NaN threshold ends nothing, nor does a ranking of one entry.)
    3. Rows that root and chain leave go to the cheapest paths, one after the other. A chain
       position offers its next alternate, of ranks 1 .. choices - 1. The last chain token, every
       alternate and, if there is no draft, the root offer what is behind their match in the
       history, and so does every such guess. Of equally cheap ones alternates win over guesses,
       then the lowest position or row. No row is deeper than tokens left - 1.
    4. Verify: one pass. Row 0 is the root, row i + 1 chain position i, behind them the others in
       the order of their choice. `row_place` has each row's position less that of the root, the row
       that it follows, and its origin.
    5. Accept: from row 0 on, the row's best token is committed. The lowest row that follows this
       one and has that token is next, until there is none, or the token is a stop token.
    6. Commit: every such token goes to the ring in memory and to the history. With `move`, a pass
       of kind MOVE for each of them whose row is not its number then brings the KV entry that it
       was chosen by to where that number says, by rising numbers. When all this is done, POSITION,
       ROOT, RING_INDEX and HISTORY_LENGTH move on. Then, with `steps`, `step_request` until the
       host has answered.

    A draft length of 0 is plain decoding: verify passes of one row. Nothing is guessed if all
    costs of guesses are 255 or the history has fewer than two tokens.

    Cycles, without those of passes, writes and the host: 5 from `begin`, the host's answer or,
    without `steps`, from two cycles behind the end of writes to the first pass. From a draft pass
    to the next 19 with up to two choices, and 1 for each further one. From the last draft pass to
    the verify pass, with a chain of c and a alternates, about (a + 1) (c + 4) + 20. Behind the
    verify pass 4 for each token, and one for each row that is compared: up to all. If something may
    be guessed, scans of the history come on top (`NgramMatcher`): that of the root before the first
    draft pass, if `guess_limit` is above a cost of guesses, and that of the last chain position;
    those of the others are hidden by the next draft pass unless this is shorter. Each row added
    takes up to rows + 9 cycles then.

    Flow control: `passes`, `write_command` and `write_data` may stall; the payloads of `passes`
    stay until the next pass. `pass_done` may come from the cycle after the pass was taken on. No
    output depends on an input of the same cycle but two events, on `pass_done`, and `update` of the
    history, on `history_append`.

    `clear` brings it back to idle at any time (valid may fall); what shows the state of the run,
    up to RING_INDEX and STEP, is kept for the host, also by a reset, and set anew by `begin`. The
    history is kept, but if a step was being committed, some of its tokens may have replaced the
    oldest ones: then it has to be written anew.

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
        while a pass, other than a MOVE, is under way.
    write_command, write_data : Out(streams)
        One beat per committed token, of `config.data`.
    write_done : In(1)
        Pulse: the oldest write is in memory.
    step_request : Out(1)
        Level, in runs with `steps`: a step has been committed.
    step_answer, step_finish : In(1)
        Pulse, and whether the run is to end.
    finished : Out(1)
        Pulse: the run has ended.
    row_token, row_place, pass_status, pass_position, step, ring_index : Out
        The registers ROW_TOKEN, ROW_PLACE, PASS, PASS_POSITION, STEP and RING_INDEX. In a single
        pass tokens have no meaning, and row i has depth i. In a MOVE they are as before.
    update : Out(1)
        Pulse: POSITION and ROOT become `position` and `root`.
    position, root : Out
        Entries in the KV cache, and the last committed token.
    history_append : In(1), history_token : In(TOKEN_BITS)
        Pulse, ignored unless idle: append a token to the history. These and the next two are there
        if the configuration has a history.
    history_update : Out(1), history_length : Out
        Pulse: HISTORY_LENGTH becomes `history_length`.
    events : Out(speculation_events_layout())
    clear : In(1)
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        status, values = status_layout(config), values_layout(config)
        history = {}
        if config.history:
            history = {
                "history_append": In(1),
                "history_token": In(TOKEN_BITS),
                "history_update": Out(1),
                "history_length": Out(values.members["history_length"]),
            }
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
                "row_place": Out(status.members["row_place"]),
                "pass_status": Out(status.members["pass"]),
                "pass_position": Out(status.members["pass_position"]),
                "step": Out(status.members["step"]),
                "ring_index": Out(status.members["ring_index"]),
                "update": Out(1),
                "position": Out(values.members["position"]),
                "root": Out(TOKEN_BITS),
                **history,
                "events": Out(speculation_events_layout()),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config, r = self.config, _Registers(self.config)
        alternates = Ram(_alternate_layout(config).size, config.choices * config.engine.rows)
        m.submodules.alternates = alternates
        m.submodules.gap = gap = Fp32Gap()
        guesses = matcher = None
        if config.history:
            rows = max(2, config.engine.rows)  # a memory has an address
            m.submodules.guesses = guesses = Ram(_guess_layout(config).size, rows)
            m.submodules.matcher = matcher = NgramMatcher(config)
            self._connect_history(m, r, matcher)
        self._show(m, r)
        self._write_ring(m, r)
        with m.FSM():
            self._run_states(m, r, matcher)
            self._pass_states(m, r)
            self._draft_states(m, r, alternates, gap, matcher)
            self._allot_states(m, r, alternates, guesses, matcher)
            if guesses is not None and matcher is not None:
                self._guess_states(m, r, guesses, matcher)
            self._accept_states(m, r, matcher)
            if config.lanes:
                self._move_states(m, r)
            self._commit_states(m, r)
        return ResetInserter(self.clear)(m)

    def _show(self, m: Module, r: _Registers) -> None:
        """Outputs that are registers."""
        payload = self.passes.payload
        m.d.comb += payload.eq(r.now)
        if self.config.lanes:
            with m.If(r.moving):
                m.d.comb += [payload.kind.eq(PassKind.MOVE), payload.rows.eq(1)]
                m.d.comb += payload.position.eq(r.target)
        m.d.comb += [
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
                self.row_place[i].depth.eq(r.depths[i]),
                self.row_place[i].parent.eq(r.parents[i]),
                self.row_place[i].origin.eq(r.origins[i]),
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

    def _connect_history(self, m: Module, r: _Registers, matcher: NgramMatcher) -> None:
        """The matcher but for what the states do, and HISTORY_LENGTH."""
        length = self.values.history_length
        total = length + Mux(self.update, r.committed, 1)
        m.d.comb += [
            matcher.length.eq(length),
            matcher.token.eq(self.entries[0].token),
            matcher.position.eq(r.place),
            matcher.choice.eq(r.rank),
            matcher.place.eq(r.guess.next),
            self.history_length.eq(Mux(total > self.config.history, self.config.history, total)),
        ]
        for i in range(self.config.choices):
            m.d.comb += matcher.candidates[i].eq(self.entries[i].token)

    def _run_states(self, m: Module, r: _Registers, matcher: NgramMatcher | None) -> None:
        """The start of a run, and of a step or the single pass."""
        values, rows = self.values, self.config.engine.rows
        unfilled = Signal(signed(len(r.position) + 1), reset_less=True)  # entries of the prompt
        with m.State("IDLE"):
            if matcher is not None:
                m.d.comb += [
                    matcher.append.eq(self.history_append),
                    matcher.token.eq(self.history_token),
                    self.history_update.eq(self.history_append),
                ]
            with m.If(self.begin):
                m.d.sync += [
                    r.position.eq(values.position),
                    r.root.eq(values.root),
                    r.ring_index.eq(0),
                    r.step.eq(0),
                ]
                m.next = "START"
        with m.State("START"):
            m.d.sync += [
                r.left.eq(values.token_limit - r.ring_index - 1),
                r.tokens[0].eq(r.root),
                *(register.eq(0) for register in (r.row, r.place, r.rank)),
                *(register.eq(0) for register in (r.chain, r.cost, r.stop, r.accepted)),
                *(register.eq(0) for register in (r.alternates, r.alternate_hit, r.guess_hits)),
                *(register.eq(0) for register in (r.committed, *r.counts, *r.origins, *r.offers)),
                *(depth.eq(i) for i, depth in enumerate(r.depths)),
                *(parent.eq(max(0, i - 1)) for i, parent in enumerate(r.parents)),
                r.is_free.eq(0),
                unfilled.eq(values.prompt_end - r.position),
            ]
            if self.config.lanes:
                m.d.sync += [r.moving.eq(0), r.moves.eq(0)]
            if matcher is not None:
                costs = _costs(values.guess_costs)
                guesses = Cat(cost != _NO_GUESS for cost in costs).any()
                m.d.comb += matcher.restart.eq(1)
                m.d.sync += [
                    r.guesses.eq(guesses & (values.history_length >= 2)),
                    r.asks.eq(Cat(cost < values.guess_limit for cost in costs).any()),
                ]
            with m.If(values.run.speculate):
                m.next = "LIMIT"
            with m.Else():
                r.set_pass(m, PassKind.SINGLE, values.pass_rows, r.position)
                m.next = "PASS"
        with m.State("LIMIT"):
            m.d.sync += [
                r.longest.eq(Mux(r.left < values.draft_length, r.left, values.draft_length)),
                r.most.eq(Mux(r.left < rows, r.left, rows)),
            ]
            m.next = "PLAN"
            with m.If(unfilled > 0):
                r.set_pass(m, PassKind.SINGLE, Mux(unfilled < rows, unfilled, rows), r.position)
                m.next = "PASS"
        with m.State("FILLED"):
            m.d.sync += r.position.eq(r.position + r.now.rows)
            m.next = "MOVE_ON"
        with m.State("MOVE_ON"):
            m.d.comb += self.update.eq(1)
            m.next = "START"

    def _pass_states(self, m: Module, r: _Registers) -> None:
        """A pass, and where to go on behind it."""
        with m.State("PASS"):
            m.d.comb += self.passes.valid.eq(1)
            with m.If(self.passes.ready):
                m.next = "WAIT"
        with m.State("WAIT"):
            with m.If(self.pass_done):
                with m.Switch(self.passes.payload.kind):
                    with m.Case(PassKind.SINGLE):
                        m.next = "FINISH"
                        with m.If(self.values.run.speculate):
                            m.next = "FILLED"
                    with m.Case(PassKind.MOVE):
                        if self.config.lanes:
                            m.next = "MOVE"
                    with m.Case(PassKind.DRAFT):
                        m.d.comb += self.events.draft_passes.eq(1)
                        m.d.sync += r.elapsed.eq(0)
                        m.next = "MEASURE"
                    with m.Default():
                        m.d.comb += self.events.verify_passes.eq(1)
                        m.next = "READ"

    def _draft_states(
        self,
        m: Module,
        r: _Registers,
        alternates: Ram,
        gap: Fp32Gap,
        matcher: NgramMatcher | None,
    ) -> None:
        """Draft passes: the best token to the chain, the others with their costs to `alternates`.

        Before the subtraction there is a cycle for the choice of the rank, behind it one for the
        gap's index and one for its cost; this is added to the chain's in the next: that of rank 1
        in cycle `_FIRST_COST`."""
        values, entries = self.values, Array(self.entries[i] for i in range(self.config.choices))
        best = self.entries[0]
        rank = Signal.like(r.rank)  # whose cost has been looked up
        other = Signal(self.config.ranked_layout)
        logit = Signal(32, reset_less=True)  # that `gap` takes
        index = Signal(range(GAP_COSTS), reset_less=True)
        half_octave = gap.gap[_HALF_OCTAVE_LOW:]
        last_index = _FIRST_HALF_OCTAVE + GAP_COSTS - 1
        cost = Signal(_COST_BITS, reset_less=True)
        chain_cost = Signal(_COST_BITS, reset_less=True)
        m.d.comb += [
            gap.best.eq(best.logit),
            gap.other.eq(logit),
            rank.eq(r.elapsed - (_FIRST_COST - 1)),
            other.eq(entries[rank]),
            alternates.write_address.eq(Cat((rank - 1)[: len(rank)], r.chain)),
            alternates.write_data.eq(Cat(other.token, (r.cost + cost)[: len(r.cost)], other.valid)),
        ]
        m.d.sync += [
            logit.eq(entries[(r.elapsed + 1)[: len(r.rank)]].logit),
            index.eq(
                Mux(
                    half_octave < _FIRST_HALF_OCTAVE,
                    0,
                    Mux(half_octave > last_index, GAP_COSTS - 1, half_octave - _FIRST_HALF_OCTAVE),
                )
            ),
            cost.eq(Array(_costs(values.alternate_costs))[index]),
        ]
        with m.State("PLAN"):
            with m.If((r.chain < r.longest) & ~r.stop & (r.cost <= values.cost_limit)):
                if matcher is None:
                    r.set_draft_pass(m)
                else:
                    with m.If(r.asks & r.guesses):
                        m.d.comb += [matcher.restart.eq(1), matcher.scan.eq(1)]
                        m.d.sync += r.asks.eq(0)
                        m.next = "SEARCH"
                    with m.Else():
                        r.set_draft_pass(m)
            with m.Else():
                m.d.sync += [
                    r.tokens[0].eq(r.root),
                    r.used.eq(r.chain + 1),
                    r.free.eq(self.config.engine.rows - 1 - r.chain),
                ]
                m.next = "ALLOT"
                with m.If(r.chain == 0):
                    m.next = "VERIFY"
                if matcher is not None:
                    with m.Elif(r.guesses):
                        m.d.sync += [r.place.eq(r.chain - 1), r.rank.eq(0), r.key.eq(r.cost)]
                        m.d.sync += r.depth.eq(r.chain)
                        m.next = "SEARCH"
        with m.State("MEASURE"):
            m.d.sync += r.elapsed.eq(r.elapsed + 1)
            if matcher is not None:
                with m.If(r.elapsed == 0):
                    with m.If(matcher.busy):
                        m.d.sync += r.elapsed.eq(0)
                    with m.Else():
                        m.d.comb += [
                            matcher.extend.eq(1),
                            matcher.scan.eq(r.guesses),
                            matcher.position.eq(r.chain),
                        ]
            second = self.entries[1]
            with m.If(r.elapsed == _FIRST_COST - 2):
                below = (values.threshold <= FP32_INFINITY) & (gap.gap < values.threshold)
                m.d.sync += r.stop.eq(second.valid & below)
            with m.If(r.elapsed == _FIRST_COST - 1):
                costs = Array(_costs(values.chain_costs))
                m.d.sync += chain_cost.eq(Mux(second.valid, costs[index], costs[GAP_COSTS - 1]))
            with m.If(r.elapsed >= _FIRST_COST):
                m.d.comb += alternates.write_enable.eq(1)
                with m.If(rank + 1 >= values.choices):
                    m.d.sync += [
                        r.tokens[0].eq(best.token),
                        r.tokens[r.chain + 1].eq(best.token),
                        r.chain.eq(r.chain + 1),
                        r.cost.eq(r.cost + chain_cost),
                    ]
                    m.next = "PLAN"

    def _allot_states(
        self,
        m: Module,
        r: _Registers,
        alternates: Ram,
        guesses: Ram | None,
        matcher: NgramMatcher | None,
    ) -> None:
        """The cheapest paths for the free rows: place i is chain position i, with its next
        alternate, and row i, with its guess. It is read, then in a register, then compared."""
        offered = Signal(_alternate_layout(self.config), reset_less=True)
        m.d.sync += offered.eq(alternates.read_data)
        is_read = Signal()
        seen = Signal()  # that `offered` is the next alternate of position `seen_place`
        read_place = Signal.like(r.place)
        seen_place = Signal.like(r.place)
        found = Signal()
        least = Signal(_alternate_layout(self.config), reset_less=True)
        least_place = Signal.like(r.place)
        with m.State("ALLOT"):
            m.d.sync += [r.place.eq(0), found.eq(0), r.has_guess.eq(0)]
            m.next = "SCAN"
            with m.If(r.free == 0):
                m.next = "VERIFY"
        with m.State("SCAN"):
            taken = r.counts[r.place]
            m.d.comb += [
                alternates.read_enable.eq(1),
                alternates.read_address.eq(Cat(taken, r.place)),
            ]
            m.d.sync += [
                r.place.eq(r.place + 1),
                is_read.eq((r.place < r.chain) & (taken + 1 != self.values.choices)),
                read_place.eq(r.place),
                seen.eq(is_read),
                seen_place.eq(read_place),
            ]
            with m.If(seen & offered.valid & (~found | (offered.key < least.key))):
                m.d.sync += [found.eq(1), least.eq(offered), least_place.eq(seen_place)]
            places = r.chain
            if guesses is not None:
                places = Mux(r.guesses, r.used, r.chain)
                self._scan_guesses(m, r, guesses, seen_place)
            with m.If(r.place == places + 1):
                m.next = "GRANT"
        with m.State("GRANT"):
            count, depth = r.counts[least_place], least_place + 1
            is_cheapest = found
            if matcher is not None:
                is_cheapest = found & (~r.has_guess | (least.key <= r.guess.key))
            with m.If(is_cheapest):
                r.add_row(m, Origin.ALTERNATE, parent=least_place, depth=depth)
                m.d.sync += [
                    r.tokens[r.used].eq(least.token),
                    count.eq(count + 1),
                    r.alternates.eq(r.alternates + 1),
                ]
                m.next = "ALLOT"
                if matcher is not None:
                    m.d.sync += [r.place.eq(least_place), r.rank.eq(count + 1)]
                    m.d.sync += r.key.eq(least.key)
                    with m.If(r.guesses):
                        m.next = "SEARCH"
            if matcher is not None:
                with m.Elif(r.has_guess):
                    self._grant_guess(m, r, matcher)
            with m.Else():
                m.next = "VERIFY"
        with m.State("VERIFY"):
            r.set_pass(m, PassKind.VERIFY, r.used, r.position)
            m.next = "PASS"

    def _scan_guesses(self, m: Module, r: _Registers, guesses: Ram, seen_place: Signal) -> None:
        """The cheapest guess, beside the cheapest alternate."""
        offered = Signal(_guess_layout(self.config), reset_less=True)
        is_read = Signal()
        seen = Signal()  # that `offered` is the guess of row `seen_place`
        m.d.comb += [guesses.read_enable.eq(1), guesses.read_address.eq(r.place)]
        m.d.sync += [
            offered.eq(guesses.read_data),
            is_read.eq((r.place < r.used) & r.offers[r.place]),
            seen.eq(is_read),
        ]
        with m.If(seen & (~r.has_guess | (offered.key < r.guess.key))):
            m.d.sync += [r.has_guess.eq(1), r.guess.eq(offered), r.guess_row.eq(seen_place)]

    def _grant_guess(self, m: Module, r: _Registers, matcher: NgramMatcher) -> None:
        """A row for the cheapest guess, which then offers the token behind it."""
        following = (r.guess.next + 1)[: len(r.guess.next)]
        depth = r.depths[r.guess_row] + 1
        r.add_row(m, Origin.GUESS, parent=r.guess_row, depth=depth)
        m.d.sync += [
            r.offers[r.guess_row].eq(0),
            r.key.eq(r.guess.key),
            r.exists.eq(following != matcher.end),
            r.guess.next.eq(following),
        ]
        m.next = "GUESS"

    def _guess_states(self, m: Module, r: _Registers, guesses: Ram, matcher: NgramMatcher) -> None:
        """What a row guesses behind itself: the root, the row that was added last, or the chain's
        end. Its match is that of choice `rank` at position `place`, its path costs `key`."""
        values, match = self.values, matcher.match
        costs = Array(_costs(values.guess_costs))
        length = Signal.like(match.length, reset_less=True)
        follow = (matcher.end - r.guess.next)[: self.config.history_bits]
        with m.State("SEARCH"):
            with m.If(~matcher.busy):
                m.next = "RECALL"
        with m.State("RECALL"):
            m.next = "MATCH_FOUND"
        with m.State("MATCH_FOUND"):
            m.d.sync += [length.eq(match.length), r.guess.next.eq(match.next)]
            m.next = "PRICE"
        with m.State("PRICE"):
            m.d.sync += [r.guess.cost.eq(costs[(length - 1)[:2]]), r.exists.eq(length != 0)]
            m.next = "OFFER"
            with m.If(r.chain == 0):  # of the root
                m.next = "DECIDE"
        with m.State("DECIDE"):
            is_cheap = r.guess.cost < values.guess_limit
            m.d.sync += [
                r.is_free.eq(r.exists & is_cheap & (follow >= _SHORTEST_FREE_GUESS)),
                *(r.used.eq(1), r.free.eq(self.config.engine.rows - 1)),
                *(r.key.eq(0), r.depth.eq(0)),
            ]
            m.next = "DECIDED"
        with m.State("DECIDED"):
            m.next = "PLAN"
            with m.If(r.is_free):
                m.next = "OFFER"
        # The history's memory gives its token late in the cycle.
        (known,) = pipeline_stage(m, 1, known=matcher.known)
        with m.State("GUESS"):
            m.next = "GUESSED"
        with m.State("GUESSED"):
            m.d.sync += r.tokens[(r.used - 1)[: len(r.used)]].eq(known)
            m.next = "OFFER"
        with m.State("OFFER"):
            row = (r.used - 1)[: len(r.used)]
            key = (r.key + r.guess.cost)[: len(r.key)]
            m.d.comb += [
                guesses.write_enable.eq(1),
                guesses.write_address.eq(row),
                guesses.write_data.eq(Cat(key, r.guess.next, r.guess.cost)),
            ]
            m.d.sync += r.offers[row].eq(
                r.exists & (r.guess.cost != _NO_GUESS) & (r.depth < r.most)
            )
            m.next = "ALLOT"

    def _accept_states(self, m: Module, r: _Registers, matcher: NgramMatcher | None) -> None:
        """The walk from row 0 on, to rows that follow the last one and have its best token."""
        with m.State("READ"):
            m.next = "TAKE"
        with m.State("TAKE"):
            values = self.values
            last = Cat(i < values.ring_log2 for i in range(MAX_RING_LOG2))  # slot of the ring
            m.d.sync += [
                r.root.eq(self.entries[0].token),
                r.chosen.eq(r.row),
                r.slot.eq((r.ring_index + r.committed) & last),
                r.committed.eq(r.committed + 1),
                r.candidate.eq(r.row + 1),
            ]
            if self.config.lanes:
                m.d.sync += [
                    r.path[r.committed].eq(r.row),
                    r.moves.eq(r.moves | (r.row != r.committed)),
                ]
            if matcher is not None:
                m.d.comb += matcher.append.eq(1)
            m.next = "WRITE"
        with m.State("WRITE"):
            command, beat = self.write_command, self.write_data
            m.d.comb += [command.valid.eq(~r.command_taken), beat.valid.eq(~r.beat_taken)]
            command_taken = r.command_taken | command.ready
            beat_taken = r.beat_taken | beat.ready
            m.d.sync += [r.command_taken.eq(command_taken), r.beat_taken.eq(beat_taken)]
            stops = (
                (i < self.values.stop_tokens) & (r.root == token)
                for i, token in enumerate(self.values.stop_token)
            )
            m.d.sync += r.ends.eq(Cat(stops).any())
            with m.If(command_taken & beat_taken):
                m.d.sync += [r.command_taken.eq(0), r.beat_taken.eq(0)]
                m.next = "MATCH"
        # Of all rows at once, as root and row are known a cycle or more before.
        fits = Array(Signal(name=f"fits_{i}", reset_less=True) for i in range(len(r.tokens)))
        for fit, token, parent in zip(fits, r.tokens, r.parents, strict=True):
            m.d.sync += fit.eq((token == r.root) & (parent == r.row))
        with m.State("MATCH"):
            candidate = r.candidate[: len(r.row)]
            origin = r.origins[candidate]
            m.d.sync += r.candidate.eq(r.candidate + 1)
            with m.If(r.candidate == r.used):
                m.next = "DRAIN"
            with m.Elif(fits[candidate]):
                m.d.sync += [
                    r.row.eq(candidate),
                    r.accepted.eq(r.accepted + (origin == Origin.CHAIN)),
                    r.alternate_hit.eq(r.alternate_hit | (origin == Origin.ALTERNATE)),
                    r.guess_hits.eq(r.guess_hits + (origin == Origin.GUESS)),
                ]
                m.next = "READ"
                with m.If(r.ends):
                    m.next = "DRAIN"

    def _move_states(self, m: Module, r: _Registers) -> None:
        """The moves of entries: that of row `path[place]` to `place`."""
        with m.State("MOVE"):
            row = r.path[r.place]
            m.d.sync += r.place.eq(r.place + 1)
            with m.If(r.place == r.committed):
                m.next = "DRAIN"
            with m.Elif(row != r.place):
                m.d.sync += [
                    r.moving.eq(1),
                    r.target.eq(r.position + r.place),
                    r.now.source.eq(r.position + row),
                ]
                m.next = "PASS"

    def _commit_states(self, m: Module, r: _Registers) -> None:
        """The end of a step, and of a run."""
        with m.State("DRAIN"):
            written = r.writes == 0
            if self.config.lanes:
                moves = written & r.moves & self.values.run.move
                written &= ~moves
                with m.If(moves):
                    m.d.sync += [r.place.eq(0), r.moves.eq(0)]
                    m.next = "MOVE"
            with m.If(written):
                m.d.sync += [
                    r.ring_index.eq(r.ring_index + r.committed),
                    r.position.eq(r.position + r.committed),
                    r.step.committed.eq(r.committed),
                    r.step.accepted.eq(r.accepted),
                    r.step.last_row.eq(r.chosen),
                    r.step.chain.eq(r.chain),
                ]
                m.next = "COMMIT"
        with m.State("COMMIT"):
            m.d.comb += [
                self.update.eq(1),
                self.events.alternates.eq(r.alternates),
                self.events.accepted.eq(r.accepted),
                self.events.alternate_hits.eq(r.alternate_hit),
                self.events.committed.eq(r.committed),
                self.events.guesses.eq(r.used - 1 - r.chain - r.alternates),
                self.events.guess_hits.eq(r.guess_hits),
                self.events.free_steps.eq(r.is_free),
            ]
            if self.config.history:
                m.d.comb += self.history_update.eq(1)
            m.d.sync += r.ends.eq(r.ends | (r.ring_index >= self.values.token_limit))
            m.next = "STEP"
        with m.State("STEP"):
            m.d.comb += self.step_request.eq(self.values.run.steps)
            with m.If(self.step_answer | ~self.values.run.steps):
                m.next = "START"
                with m.If(r.ends | (self.step_answer & self.step_finish)):
                    m.next = "FINISH"
        with m.State("FINISH"):
            m.d.comb += self.finished.eq(1)
            m.next = "IDLE"


def _costs(table: ValueLike) -> list[Value]:
    """The costs in a register."""
    bits = Value.cast(table)
    return [bits[low : low + _COST_BITS] for low in range(0, len(bits), _COST_BITS)]


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
        self.parents = registers(config.engine.row_bits, "parent", rows)
        self.origins = registers(Shape.cast(Origin), "origin", rows)
        # The step: tokens that are left behind the target's own, largest depth, the chain and its
        # cost, rows that have their tokens, those left, alternates by chain position.
        self.left = register(values["token_limit"], "left")
        self.most = register(count_bits, "most")
        self.longest = register(count_bits, "longest")
        self.chain = register(count_bits, "chain")
        self.cost = register(_key_bits(config), "cost")
        self.stop = register(1, "stop")
        self.used = register(count_bits, "used")
        self.free = register(count_bits, "free")
        self.counts = registers(rank_bits, "count", rows)
        self.alternates = register(count_bits, "alternates")
        self.accepted = register(count_bits, "accepted")
        self.alternate_hit = register(1, "alternate_hit")
        self.guess_hits = register(count_bits, "guess_hits")
        self.committed = register(count_bits, "committed")
        self.ends = register(1, "ends")  # the run, behind the step
        # Moves: by number of a committed token the row that it was chosen by; whether there are
        # any to make, and whether the pass is one; where it moves an entry to.
        self.path = registers(config.engine.row_bits, "path", rows)
        self.moves = register(1, "moves")
        self.moving = register(1, "moving")
        self.target = register(config.engine.k_bits, "target")
        # Guesses: whether there can be any, whether the root is still to be looked for, whether
        # there is no draft; rows that offer one; the cheapest of these, or the one that is made;
        # whether its token is there; cost and depth of the row that offers it.
        self.guesses = register(1, "guesses")
        self.asks = register(1, "asks")
        self.is_free = register(1, "is_free")
        self.offers = registers(1, "offer", rows)
        self.guess = register(_guess_layout(config), "guess")
        self.guess_row = register(count_bits, "guess_row")
        self.has_guess = register(1, "has_guess")
        self.exists = register(1, "exists")
        self.key = register(_key_bits(config), "key")
        self.depth = register(count_bits, "row_depth")
        # Indices.
        self.place = register(count_bits, "place")
        self.rank = register(rank_bits, "rank")
        self.row = register(config.engine.row_bits, "row")
        self.chosen = register(config.engine.row_bits, "chosen")  # that of the last token
        self.candidate = register(count_bits, "candidate")
        self.elapsed = register(range(_FIRST_COST + config.choices), "elapsed")
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

    def set_draft_pass(self, m: Module) -> None:
        """Set the next draft pass, and go on to it."""
        self.set_pass(m, PassKind.DRAFT, 1, self.position + self.chain)
        m.next = "PASS"

    def add_row(self, m: Module, origin: Origin, parent: Signal, depth: Value) -> None:
        """Take the next free row; its token comes extra."""
        m.d.sync += [
            self.depths[self.used].eq(depth),
            self.parents[self.used].eq(parent),
            self.origins[self.used].eq(origin),
            self.depth.eq(depth),
            self.used.eq(self.used + 1),
            self.free.eq(self.free - 1),
        ]
