# SPDX-License-Identifier: Apache-2.0
"""Where the last tokens have occurred before (see `longest_match` of `speq.model.draft_tree`)."""

from __future__ import annotations

from itertools import pairwise

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.common.ram import Ram

#: Tokens of a match that make a difference.
LONGEST_MATCH = 4

_SLICE_BITS = 4  # of two tokens that are compared in one level of logic


def match_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A match of `length` tokens, 1 to `LONGEST_MATCH`, 0: none; `next` is where the token behind
    it is in the history."""
    return data.StructLayout(
        {"length": range(LONGEST_MATCH + 1), "next": config.history_bits},
    )


class NgramMatcher(wiring.Component):
    """The last committed tokens, and the longest match of a path behind them.

    The history is a ring of `config.history` tokens, of which the last `length` count. A path of
    tokens continues it: the drafted chain and, as its last token, one of `config.choices`
    candidates. A scan goes through the history once, from the oldest token to the last but one, and
    compares each with all candidates, and with the up to three tokens before them. For each
    candidate it finds the longest match that ends with it, of equally long ones the latest; its
    length is the number of tokens that agree, but at most `LONGEST_MATCH`, and no match goes beyond
    the oldest token. All matches are kept, by chain position and candidate.

    Cycles: `busy` for `length` - 1 + `OVERHEAD` + `config.choices` behind a scan's start, or for
    1 + `config.choices` if there are fewer than two tokens.

    Flow control: `append`, `restart`, `extend` and what is read are for times at which it is not
    busy. `length` has to be kept meanwhile.

    Parameters
    ----------
    config : AcceleratorConfig
        Its history is not 0.

    Members
    -------
    append : In(1), token : In(TOKEN_BITS)
        Put a token behind the last one.
    length : In(range(history + 1))
        Tokens that count.
    restart : In(1)
        The path is empty: the only candidate, number 0, is the history's last token.
    extend : In(1), candidates : In(ArrayLayout(TOKEN_BITS, choices))
        Candidate 0 of before is the chain's, and these come behind it. The first time behind a
        restart, they come behind the history's last token.
    scan : In(1)
        With `restart` or `extend`: find the matches of the candidates. Without `extend` those of
        all but candidate 0 have no meaning.
    position : In(row_bits)
        Where the matches of the scan that starts are kept; else what is read.
    choice : In(range(choices)), match : Out(match_layout(config))
        The match of candidate `choice` at `position`, in the next cycle.
    place : In(history_bits), known : Out(TOKEN_BITS)
        The history's token at a place, in the next cycle.
    end : Out(history_bits)
        The place behind the last token.
    busy : Out(1)
        From the cycle after a scan's start.
    """

    #: Cycles of a scan beyond its tokens and candidates.
    OVERHEAD = 5

    def __init__(self, config: AcceleratorConfig) -> None:
        if not config.history:
            raise ValueError("the configuration has no history")
        self.config = config
        super().__init__(
            {
                "append": In(1),
                "token": In(TOKEN_BITS),
                "length": In(range(config.history + 1)),
                "restart": In(1),
                "extend": In(1),
                "candidates": In(data.ArrayLayout(TOKEN_BITS, config.choices)),
                "scan": In(1),
                "position": In(config.engine.row_bits),
                "choice": In(range(config.choices)),
                "match": Out(match_layout(config)),
                "place": In(config.history_bits),
                "known": Out(TOKEN_BITS),
                "end": Out(config.history_bits),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.history = history = Ram(TOKEN_BITS, config.history)
        layout = match_layout(config)
        m.submodules.matches = matches = Ram(layout.size, config.choices * config.engine.rows)

        # The history.
        end = Signal.like(self.end, reset_less=True)
        last = [Signal(TOKEN_BITS, name=f"last_{i}", reset_less=True) for i in range(LONGEST_MATCH)]
        m.d.comb += [
            self.end.eq(end),
            history.write_enable.eq(self.append),
            history.write_address.eq(end),
            history.write_data.eq(self.token),
            self.known.eq(history.read_data),
        ]
        with m.If(self.append):
            m.d.sync += end.eq(end + 1)
            m.d.sync += Cat(last).eq(Cat(self.token, last[:-1]))

        # What a scan looks for.
        candidates = [
            Signal(TOKEN_BITS, name=f"candidate_{i}", reset_less=True)
            for i in range(config.choices)
        ]
        before = [
            Signal(TOKEN_BITS, name=f"before_{i}", reset_less=True) for i in range(1, LONGEST_MATCH)
        ]
        with m.If(self.restart):
            m.d.sync += Cat(candidates[0], before).eq(Cat(last))
        with m.Elif(self.extend):
            m.d.sync += Cat(before).eq(Cat(candidates[0], before[:-1]))
            m.d.sync += Cat(candidates).eq(self.candidates)

        # The scan.
        left = Signal.like(self.length, reset_less=True)  # tokens to read
        address = Signal.like(end, reset_less=True)
        position = Signal.like(self.position, reset_less=True)
        count = Signal(range(config.choices), reset_less=True)
        read, store, clear = Signal(), Signal(), Signal()
        found = [Signal(layout, name=f"found_{i}", reset_less=True) for i in range(config.choices)]
        under_way = self._compare(m, history.read_data, read, clear, candidates, before, found)
        m.d.comb += [
            history.read_enable.eq(1),
            history.read_address.eq(Mux(self.busy, address, self.place)),
            matches.read_enable.eq(1),
            matches.read_address.eq(Cat(self.choice, self.position)),
            self.match.eq(matches.read_data),
            matches.write_enable.eq(store),
            matches.write_address.eq(Cat(count, position)),
            matches.write_data.eq(found[0]),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += [
                    address.eq(end - self.length),
                    left.eq(Mux(self.length == 0, 0, self.length - 1)),
                    count.eq(0),
                ]
                with m.If(self.scan):
                    m.d.sync += position.eq(self.position)
                    m.d.comb += clear.eq(1)
                    m.next = "SCAN"
            with m.State("SCAN"):
                m.d.comb += [self.busy.eq(1), read.eq(left != 0)]
                with m.If(read):
                    m.d.sync += [address.eq(address + 1), left.eq(left - 1)]
                with m.Elif(~under_way):
                    m.next = "STORE"
            with m.State("STORE"):
                m.d.comb += [self.busy.eq(1), store.eq(1)]
                m.d.sync += count.eq(count + 1)
                for mine, other in pairwise(found):
                    m.d.sync += mine.eq(other)
                with m.If(count == config.choices - 1):
                    m.next = "IDLE"
        return m

    def _compare(
        self,
        m: Module,
        read_data: Value,
        read: Signal,
        clear: Signal,
        candidates: list[Signal],
        before: list[Signal],
        found: list[Signal],
    ) -> Value:
        """The pipeline from a token that is read, in the cycle before it comes, to `found`. Returns
        whether anything is in it."""
        token = Signal(TOKEN_BITS, reset_less=True)
        valid = Signal(4)  # of each stage
        m.d.sync += [valid.eq(Cat(read, valid[:-1])), token.eq(read_data)]
        # Stages 2 and 3: which of the tokens it is.
        hits = Signal(len(candidates), reset_less=True)
        agrees = Signal(len(before), reset_less=True)
        for i, (sought, result) in enumerate(
            [*zip(candidates, hits, strict=True), *zip(before, agrees, strict=True)]
        ):
            slices = Signal(TOKEN_BITS // _SLICE_BITS, name=f"slices_{i}", reset_less=True)
            for k, is_same in enumerate(slices):
                part = slice(_SLICE_BITS * k, _SLICE_BITS * (k + 1))
                m.d.sync += is_same.eq(token[part] == sought[part])
            m.d.sync += result.eq(slices.all())
        # Stage 4: how many tokens before it agree. Where the history begins nothing does.
        lines = [Signal(i + 1, name=f"agreed_{i + 1}", reset_less=True) for i in range(len(before))]
        following = Signal.like(self.end, reset_less=True)  # behind this token's place
        with m.If(clear):
            m.d.sync += [following.eq(self.end - self.length + 1), Cat(lines).eq(0)]
            for match in found:
                m.d.sync += match.length.eq(0)
        with m.Elif(valid[-1]):
            m.d.sync += following.eq(following + 1)
            for line, agree in zip(lines, agrees, strict=True):
                m.d.sync += line.eq(Cat(agree, line[:-1]))
            length = Signal(range(LONGEST_MATCH + 1))
            m.d.comb += length.eq(1)
            for i in range(len(lines)):
                with m.If(Cat(line[-1] for line in lines[: i + 1]).all()):
                    m.d.comb += length.eq(i + 2)
            for hit, match in zip(hits, found, strict=True):
                with m.If(hit & (length >= match.length)):
                    m.d.sync += [match.length.eq(length), match.next.eq(following)]
        return valid.any()
