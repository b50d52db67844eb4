# SPDX-License-Identifier: Apache-2.0
"""The tree of a verify pass: against a plain reference, and by hand."""

from __future__ import annotations

import math
import os
import random
import struct
from dataclasses import replace

import pytest

from speq.model.draft_tree import (
    Match,
    Origin,
    Proposal,
    chain_ends,
    free_proposal,
    gap_index,
    grow,
    longest_match,
)
from speq.model.settings import NO_GUESS, Policy, Settings

SEED = int(os.environ.get("SPEQ_SEED", "0"))
CHAIN, ALTERNATE, GUESS = Origin
#: Costs that are easy to add: 10 a chain token, 16 an index for alternates, 4 a guess.
SIMPLE = Policy((10,) * 16, guess_costs=(NO_GUESS, 8, 4, 4))


def random_policy(rng: random.Random) -> Policy:
    def table(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(count))

    return Policy(table(16), table(16), table(4), rng.randrange(900), rng.randrange(256))


def test_indices_are_half_octaves_of_the_bits():
    rng = random.Random(SEED)
    patterns = [0, 1, 0x7F800000, *(rng.randrange(0x7F800000) for _ in range(5000))]
    patterns += [(127 + e << 23) + m for e in range(-5, 7) for m in (0, 0x3FFFFF, 0x400000)]
    for pattern in patterns:
        (gap,) = struct.unpack("<f", struct.pack("<I", pattern))
        assert gap_index(gap) == min(max((pattern >> 22) - 2 * 124, 0), 15), f"{pattern:#x}"
    assert [gap_index(x) for x in (0.1249, 0.1875, 0.25, 1.0, 22.0, 24.0)] == [0, 1, 2, 6, 14, 15]


def every_match(history: list[int], path: list[int]) -> list[Match]:
    """All places where the path's end has occurred, however short."""
    text = history + path
    found = []
    for i in range(len(history) - 1):
        n = 0
        while n < 4 and n <= i and n < len(text) and history[i - n] == text[len(text) - 1 - n]:
            n += 1
        if n:
            found.append(Match(n, i + 1))
    return found


def test_matches_against_a_plain_search():
    rng = random.Random(SEED)
    lengths = set()
    for _ in range(3000):
        words = rng.randint(1, 4)
        history = [rng.randrange(words) for _ in range(rng.randint(1, 30))]
        path = [rng.randrange(words) for _ in range(rng.randrange(6))]
        expected = max(every_match(history, path), default=None)
        assert longest_match(history, path) == expected, (SEED, history, path)
        lengths.add(expected and expected.length)
    assert lengths == {None, 1, 2, 3, 4}


def test_matches_by_hand():
    assert longest_match([], []) is None
    assert longest_match([5], []) is None
    assert longest_match([5, 6], [5]) == (1, 1)
    assert longest_match([5, 6], [6]) is None  # nothing follows the last token
    assert longest_match([1, 2, 3, 9, 2, 3, 7, 2, 3]) == (2, 6)  # the latest
    assert longest_match([1, 2, 3, 9, 2, 3, 7], [1, 2, 3]) == (3, 3)  # the longest
    assert longest_match([4, 4, 4, 4, 4, 4]) == (4, 5)


def test_free_rows_go_to_the_cheapest_paths():
    """Chain 5 6 7; its second position's alternates are the closest, then the third's."""
    choices = [[5, 1, 2], [6, 3, 4], [7, 8, 9]]
    gaps = [[0, 8.0, 9.0], [0, 0.1, 1.0], [0, 0.3, 0.5]]
    policy = replace(SIMPLE, chain_costs=(1,) * 16)
    tree = grow(policy, [0], choices, gaps, 8, 20)
    assert tree.chain == [5, 6, 7]
    # Costs: 1 + 0, 2 + 2 * 16, 2 + 4 * 16, 1 + 6 * 16, and 12 * 16 at the first position.
    assert tree.tokens[3:] == [3, 8, 9, 4] and tree.parents[3:] == [1, 2, 2, 1]
    assert set(tree.origins[3:]) == {ALTERNATE}
    more = grow(policy, [0], choices, gaps, 64, 20)
    assert more.tokens == [*tree.tokens, 1, 2] and more.parents[7:] == [0, 0]
    assert grow(policy, [0], choices, gaps, 4, 20).tokens == [5, 6, 7]
    assert grow(policy, [0], [], [], 8, 20).rows == 1


def test_dearer_chains_make_later_alternates_dearer():
    choices, gaps = [[5, 1], [6, 2]], [[0, 1.0], [0, 1.0]]
    cheap = grow(replace(SIMPLE, chain_costs=(0,) * 16), [0], choices, gaps, 4, 9)
    assert cheap.parents == [0, 1, 0]  # equally cheap: the lowest position
    gaps = [[0, 1.0], [0, 0.7]]
    assert grow(replace(SIMPLE, chain_costs=(31,) * 16), [0], choices, gaps, 4, 9).parents[2] == 1
    assert grow(replace(SIMPLE, chain_costs=(33,) * 16), [0], choices, gaps, 4, 9).parents[2] == 0


def test_guesses_follow_the_chain_and_alternates():
    history = [5, 6, 7, 8, 9, 1, 5, 2, 3, 4, 0, 5]
    choices, gaps = [[6, 2]], [[0, 0.1]]
    tree = grow(SIMPLE, history, choices, gaps, 6, 20)
    # Alternate: 0. Behind it 5 2 goes on with 3, 8 a token; behind the chain 5 6 with 7: 10 + 8.
    assert tree.tokens == [6, 2, 3, 4, 7]
    assert tree.origins == [CHAIN, ALTERNATE, GUESS, GUESS, GUESS]
    assert tree.parents == [0, 0, 2, 3, 1]
    assert tree.depths == [0, 1, 1, 2, 3, 2]
    shallow = grow(SIMPLE, history, choices, gaps, 6, 2)
    assert (shallow.tokens, shallow.parents) == ([6, 2, 3, 7], [0, 0, 2, 1])
    assert grow(SIMPLE, history, choices, gaps, 6, 1).tokens == [6, 2]
    unseen = replace(SIMPLE, guess_costs=(NO_GUESS,) * 4)
    assert grow(unseen, history, choices, gaps, 6, 20).tokens == [6, 2]


def test_a_guess_ends_with_the_history():
    history = [5, 6, 7, 5, 6]
    tree = grow(SIMPLE, history, [[7]], [[0, 9.0]], 9, 20)
    assert tree.tokens == [7, 5, 6] and tree.origins == [CHAIN, GUESS, GUESS]


def test_steps_without_a_draft_pass():
    policy = replace(SIMPLE, guess_limit=5)
    history = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    tree = free_proposal(policy, history, 5, 20)
    assert tree.tokens == [4, 5, 6, 7] and tree.parents == [0, 1, 2, 3]
    assert set(tree.origins) == {GUESS} and tree.chain == [] and tree.margins == []
    assert free_proposal(policy, history, 8, 2).tokens == [4, 5]
    assert free_proposal(replace(policy, guess_limit=4), history, 5, 20) is None
    assert free_proposal(policy, [2, 3, 8, 8, 2, 3], 5, 20) is None  # 8 a token
    short = [1, 2, 3, 4, 1, 2, 3]
    assert free_proposal(policy, short, 8, 20).tokens == [4, 1, 2, 3]
    assert free_proposal(policy, [3, 3, 3, 3, 3], 8, 20) is None  # one token behind the match
    assert free_proposal(policy, [9], 8, 20) is None


def test_chains_end_where_they_are_unlikely():
    policy = Policy(tuple(range(0, 32, 2))[::-1], limit=40)
    assert [chain_ends(policy, 0.0, [gap]) for gap in (0.0, 24.0)] == [False, False]
    assert not chain_ends(policy, 0.0, [0.0, 6.0])  # 30 + 8
    assert chain_ends(policy, 0.0, [0.0, 2.0])  # 30 + 14
    assert not chain_ends(replace(policy, limit=44), 0.0, [0.0, 2.0])
    assert chain_ends(policy, 1.5, [1.0]) and not chain_ends(policy, 1.0, [1.0])


@pytest.mark.parametrize("rows", [3, 4, 8, 16])
def test_trees_are_well_formed(rows):
    """Parents come first, siblings differ, costs rise along paths and in the order of rows."""
    rng = random.Random(SEED + rows)
    seen = dict.fromkeys(Origin, 0)
    for _ in range(400):
        words = rng.randint(2, 6)
        policy = random_policy(rng)
        history = [rng.randrange(words) for _ in range(rng.randint(1, 40))]
        most = rng.randint(1, 2 * rows)
        length = rng.randint(0, min(rows - 1, most))
        choices = [rng.sample(range(words), rng.randint(1, words)) for _ in range(length)]
        gaps = [
            sorted([0.0, *(rng.choice([0.2, 0.3, 1.5, 9.0, math.inf]) for _ in range(words))])
            for _ in choices
        ]
        free = free_proposal(policy, history, rows, most)
        tree = free or grow(policy, history, choices, gaps, rows, most)
        for origin in tree.origins:
            seen[origin] += 1
        assert tree.rows <= rows and max(tree.depths) <= most
        assert all(parent <= row for row, parent in enumerate(tree.parents))
        if not free:
            assert tree.chain == [tokens[0] for tokens in choices]
            assert tree.parents[:length] == list(range(length))
        for row in range(tree.rows):
            children = [tree.tokens[i - 1] for i in tree.children(row)]
            assert len(set(children)) == len(children)
            kinds = {tree.origins[i - 1] for i in tree.children(row)}
            assert GUESS not in kinds or len(children) == 1
            if row < length and not free:
                assert children == choices[row][: len(children)]
        full = tree.rows == rows
        offered = sum(map(len, choices)) if not free else 0
        assert full or tree.rows - 1 - tree.count(GUESS) == offered
    assert min(seen.values()) > 50


def test_the_neutral_policy_prefers_small_gaps():
    """Nothing is known of probabilities: no chain ends, nothing is guessed."""
    policy = Settings().policy
    assert policy == Policy() and not policy.guesses
    assert not chain_ends(policy, 0.0, [0.0] * 63)
    assert free_proposal(policy, [1, 2, 3, 1, 2, 3, 1, 2, 3], 8, 8) is None
    gaps = [[0, 1.0, 4.0, 5.7], [0, 2.0, 2.0, 9.0], [0, 0.5, 7.0, 8.0]]
    choices = [[5, 1, 2, 3], [6, 1, 2, 3], [7, 1, 2, 3]]
    tree = grow(policy, [1, 2, 1], choices, gaps, 99, 99)
    assert tree.parents[3:] == [2, 0, 1, 1, 0, 0, 2, 1, 2]  # half an octave is one index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"chain_costs": (0,) * 15},
            r"chain costs are \(0, .*; expected 16 integers from 0 to 255",
        ),
        ({"alternate_costs": (256,) * 16}, "alternate costs are"),
        ({"guess_costs": (1, 2, 3, 0.5)}, "guess costs are"),
        ({"limit": -1}, "limit is -1; expected an integer from 0 to 65535"),
        ({"limit": True}, "limit is True"),
        ({"guess_limit": 256}, "guess limit is 256; expected an integer from 0 to 255"),
    ],
)
def test_impossible_policies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Policy(**arguments)
    with pytest.raises(ValueError, match="policy is 3"):
        Settings(policy=3)
    for history in (0, 3, 1 << 17):
        with pytest.raises(ValueError, match=f"history is {history}; expected a power of two"):
            Settings(history=history)


def test_paths_of_rows():
    tree = Proposal([5, 6, 7], [0, 1, 0], [CHAIN, GUESS, ALTERNATE])
    assert [tree.path(row) for row in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 3]]
    assert [tree.count(origin) for origin in Origin] == [1, 1, 1]
