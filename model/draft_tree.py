# SPDX-License-Identifier: Apache-2.0
"""Which tokens a verify pass is to check: the likeliest paths, which form a tree.

Everything here is integers, so that hardware chooses the same rows to the bit. A *cost* is
-log2(probability) in `COST_STEPS`-ths of a bit, from the tables of a `Policy`; the cost of a path
is the sum of its tokens' costs.

    chain       the draft's best tokens, one per draft pass. All of them are rows.
    alternates  the draft's next best tokens at a chain position
    guesses     what followed where the last tokens have occurred before: the continuation of the
                longest match of a path's end in the history, of equally long ones the latest
                (Saxena, "Prompt Lookup Decoding", 2023). They go on behind the chain's end, behind
                alternates and, in steps without any draft pass, behind the root.

Rows that root and chain leave are filled one by one with the cheapest path that continues the tree.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from speq.model.settings import GAP_INDICES, LONGEST_MATCH, NO_GUESS, Policy

if TYPE_CHECKING:
    import torch

#: Gaps below this have index 0; from there on every half octave has an index of its own.
_LEAST_GAP_LOG2 = -3
#: A step needs no draft pass only if its guess has so many tokens.
SHORTEST_FREE_GUESS = 3


class Origin(enum.IntEnum):
    """Where a row's token is from. The root counts as the chain's."""

    CHAIN = 0
    ALTERNATE = 1
    GUESS = 2


class Match(NamedTuple):
    """A place of the history that a path's end has been found at.

    Attributes
    ----------
    length : tokens that agree, 1 to `LONGEST_MATCH`
    next : index in the history of the token behind them
    """

    length: int
    next: int


@dataclass
class Proposal:
    """What a verify pass is to check. Row 0 is the root, whose token is not among these.

    Attributes
    ----------
    tokens : of rows 1, 2, ...: first the chain's, then the others in the order of their choice
    parents : the row that each of them follows
    origins : where each is from
    margins : for each chain position the draft's best logit minus its second best; +infinity where
        that is NaN
    distributions : for each chain position the draft's distribution that chain token and alternates
        were drawn from, float64 [V]; empty in greedy decoding
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    distributions: list[torch.Tensor] = field(default_factory=list)

    def add(self, token: int, parent: int, origin: Origin) -> int:
        """Append a row; returns its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.origins.append(origin)
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """Rows of the verify pass, the root's included."""
        return 1 + len(self.tokens)

    @property
    def chain(self) -> list[int]:
        """The chain's tokens; number i is in row i + 1."""
        return self.tokens[: self.count(Origin.CHAIN)]

    def count(self, origin: Origin) -> int:
        """Rows of this origin, without the root."""
        return self.origins.count(origin)

    @property
    def depths(self) -> list[int]:
        """For every row, the root's included, its distance from the root."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    def children(self, row: int) -> list[int]:
        """The rows that follow a row, in their order: at a chain position the chain's is first, the
        alternates are in the order of their ranks."""
        return [i + 1 for i, parent in enumerate(self.parents) if parent == row]

    def path(self, row: int) -> list[int]:
        """The rows from the root to this one."""
        rows = [row]
        while rows[-1]:
            rows.append(self.parents[rows[-1] - 1])
        return rows[::-1]


def gap_index(gap: float) -> int:
    """Index in a table of a gap between two logits, an FP32 number that is not negative.

    The exponent and the top bit of the significand, counted from 2^-3, as far as there are indices.
    """
    if math.isinf(gap):
        return GAP_INDICES - 1
    significand, exponent = math.frexp(gap)
    index = 2 * (exponent - 1 - _LEAST_GAP_LOG2) + (significand >= 0.75)
    return min(max(index, 0), GAP_INDICES - 1) if gap else 0


def longest_match(history: Sequence[int], path: Sequence[int] = ()) -> Match | None:
    """Where the end of `history`, continued by `path`, has occurred in the history before.

    The longest match of up to `LONGEST_MATCH` tokens that has a token behind it in the history; of
    equally long ones the latest. None if the last token has not occurred.
    """
    end = [*history[-LONGEST_MATCH:], *path][-LONGEST_MATCH:][::-1]
    best = None
    for place in range(len(history) - 2, -1, -1):
        if not end or history[place] != end[0]:
            continue
        length = 1
        while length < min(len(end), place + 1) and history[place - length] == end[length]:
            length += 1
        if best is None or length > best.length:
            best = Match(length, place + 1)
        if length == LONGEST_MATCH:
            break
    return best


@dataclass(frozen=True)
class _Guess:
    """A continuation that a row offers: what its path costs, the place of its token, and what each
    of its tokens costs."""

    key: int
    next: int
    cost: int


def _guess(
    policy: Policy, history: Sequence[int], path: Sequence[int] = (), key: int = 0
) -> _Guess | None:
    """The continuation of a path that costs `key`, if its end has occurred before."""
    if not policy.guesses:
        return None
    match = longest_match(history, path)
    if match is None or (cost := policy.guess_costs[match.length - 1]) == NO_GUESS:
        return None
    return _Guess(key + cost, match.next, cost)


def free_proposal(policy: Policy, history: Sequence[int], rows: int, most: int) -> Proposal | None:
    """What to verify without any draft pass, if the last tokens have a long, likely continuation:
    their match costs less than `policy.guess_limit` and has `SHORTEST_FREE_GUESS` tokens behind it.

    Parameters
    ----------
    history : the last tokens, the root being the last of them
    rows : of the verify pass
    most : largest depth
    """
    guess = _guess(policy, history)
    if guess is None or guess.cost >= policy.guess_limit:
        return None
    if guess.next + SHORTEST_FREE_GUESS > len(history):
        return None
    return _fill(Proposal(), policy, history, [], [], [0], {0: guess}, rows, most)


def chain_cost(policy: Policy, margins: Sequence[float]) -> int:
    """Cost of the chain whose draft passes have these margins."""
    return sum(policy.chain_costs[gap_index(margin)] for margin in margins)


def chain_ends(policy: Policy, threshold: float, margins: Sequence[float]) -> bool:
    """Whether the chain ends behind the last of these draft passes."""
    return margins[-1] < threshold or chain_cost(policy, margins) > policy.limit


def grow(
    policy: Policy,
    history: Sequence[int],
    choices: Sequence[Sequence[int]],
    gaps: Sequence[Sequence[float]],
    rows: int,
    most: int,
) -> Proposal:
    """The proposal of a drafted chain, its free rows filled.

    Parameters
    ----------
    history : the last tokens, the root being the last of them
    choices : for each chain position the chain's token, then its alternates by rank
    gaps : for each chain position how far the draft's tokens 0, 1, ... are below its best, at least
        of the first two and of all choices
        For sampled decoding to be exact, which rows alternates get must depend on no alternate that
        comes later in the order of drawing; the gaps of the ranked logits do not.
    rows : of the verify pass, more than there are chain positions
    most : largest depth, at least the chain's
    """
    margins = [gap[1] for gap in gaps]
    proposal = Proposal(margins=margins)
    for i, tokens in enumerate(choices):
        proposal.add(tokens[0], i, Origin.CHAIN)
    costs = [chain_cost(policy, margins[:i]) for i in range(len(margins) + 1)]
    guesses = {}
    if choices and len(choices) < most:
        guess = _guess(policy, history, proposal.tokens, costs[-1])
        guesses = {len(choices): guess} if guess else {}
    return _fill(proposal, policy, history, choices, gaps, costs, guesses, rows, most)


def _fill(
    proposal: Proposal,
    policy: Policy,
    history: Sequence[int],
    choices: Sequence[Sequence[int]],
    gaps: Sequence[Sequence[float]],
    costs: Sequence[int],
    guesses: dict[int, _Guess],
    rows: int,
    most: int,
) -> Proposal:
    """Fill the rows that are free, the cheapest path first. Of equally cheap ones alternates win
    over guesses, and the lowest chain position or row."""
    chain = list(proposal.tokens)
    counts = [0] * len(choices)  # alternates that have a row
    while proposal.rows < rows:
        offers = [
            (cost + policy.alternate_costs[gap_index(gap[count + 1])], 0, i)
            for i, (tokens, gap, cost, count) in enumerate(
                zip(choices, gaps, costs, counts, strict=False)
            )
            if count + 1 < len(tokens)
        ]
        offers += [(guess.key, 1, row) for row, guess in guesses.items()]
        if not offers:
            break
        key, is_guess, place = min(offers)
        if is_guess:
            guess = guesses.pop(place)
            row = proposal.add(history[guess.next], place, Origin.GUESS)
            following = guess.next + 1
            more = _Guess(key + guess.cost, following, guess.cost)
            more = more if following < len(history) else None
        else:
            counts[place] += 1
            token = choices[place][counts[place]]
            row = proposal.add(token, place, Origin.ALTERNATE)
            more = _guess(policy, history, [*chain[:place], token], key)
        if more and proposal.depths[row] < most:
            guesses[row] = more
    return proposal
