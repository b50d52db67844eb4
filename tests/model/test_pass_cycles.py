# SPDX-License-Identifier: Apache-2.0
"""The model of a pass's cycles: order, waits and overlaps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from speq.model.pass_cycles import (
    Kind,
    Machine,
    Operand,
    Product,
    VectorWork,
    Walk,
    Work,
    Writes,
    pass_cycles,
    walk_cycles,
)

MACHINE = Machine(rows=8, cols=16, latency=16, result_beats=2)
LONG = Product(words=200, outputs=320, tokens=1)  # 20 tiles
SHORT = VectorWork(rows=(1,), tiles=4, chunk=2, behind=20, result=10)


def cycles(*works: Work) -> int:
    """Of these works without what every walk takes."""
    return walk_cycles(works, MACHINE) - walk_cycles([], MACHINE)


def test_a_product_takes_a_cycle_for_each_word_and_some_around_them():
    words = 20 * 200
    assert words < cycles(LONG) < words + 100
    assert cycles(replace(LONG, outputs=640)) == cycles(LONG) + words
    assert cycles(replace(LONG, outputs=321)) == cycles(LONG) + 200
    # A tile takes a cycle for each beat of results and one more; more tokens than rows are two
    # jobs.
    few = Product(words=4, outputs=320, tokens=8)
    assert cycles(few) - cycles(replace(few, outputs=304)) == 17
    assert cycles(replace(LONG, tokens=9)) - cycles(replace(LONG, tokens=8)) > words - 40


def test_the_array_waits_for_weights_that_come_slower():
    words = 20 * 200
    half = replace(MACHINE, pace=2.0)
    assert walk_cycles([LONG], half) - walk_cycles([LONG], MACHINE) == words
    third = replace(MACHINE, pace=1.5)
    assert walk_cycles([LONG], third) - walk_cycles([LONG], MACHINE) == words // 2
    # Where results take longer than weights, it does not wait.
    few = [Product(words=4, outputs=320, tokens=8)]
    assert walk_cycles(few, half) == walk_cycles(few, MACHINE)
    exact = [Product(words=200, outputs=64, planes=2, kind=Kind.RERANKED, layer_tiles=8)]
    assert walk_cycles(exact, half) - walk_cycles(exact, MACHINE) == 4 * 200
    with pytest.raises(ValueError, match=r"pace is 0\.5"):
        replace(MACHINE, pace=0.5)


def test_products_follow_each_other_without_a_gap_unless_they_wait():
    assert cycles(LONG, LONG) == cycles(LONG) + 4000
    assert cycles(LONG, replace(LONG, products=0)) > cycles(LONG) + 4000 + MACHINE.latency


def test_the_second_plane_is_late_once():
    both = replace(LONG, planes=2)
    assert cycles(both) - cycles(LONG) == 15
    assert cycles(both, both) == cycles(both) + 4000


def test_memory_that_takes_longer_shows_at_each_wait():
    slow = replace(MACHINE, latency=48)
    works = [replace(LONG, products=0, vectors=0), replace(SHORT, products=0, vectors=0)] * 2
    more = walk_cycles(works, slow) - walk_cycles(works, MACHINE)
    assert 4 * 2 * 32 <= more <= 5 * 2 * 32


def test_vector_work_beside_a_product_takes_nothing():
    assert cycles(LONG, SHORT) == cycles(LONG)
    waits = replace(SHORT, products=0)
    assert cycles(LONG, waits) > cycles(LONG) + MACHINE.latency
    # It waits for the first product alone, beside the second.
    assert cycles(LONG, LONG, replace(SHORT, products=1)) == cycles(LONG, LONG)
    assert cycles(LONG, LONG, waits) > cycles(LONG, LONG)


def test_operands_come_while_the_lanes_work_on_the_one_before():
    assert cycles(SHORT, SHORT) < 2 * cycles(SHORT) - MACHINE.latency
    alone = replace(SHORT, alone=True)
    assert cycles(alone, alone) >= 2 * cycles(alone) - 10
    waiting = replace(SHORT, vectors=0)
    assert cycles(waiting, waiting) > cycles(SHORT, SHORT)


def test_words_take_as_long_as_the_slowest_unit():
    def longer(work: VectorWork) -> int:
        """Cycles of another 100 tiles, of 2 words each."""
        return cycles(replace(work, tiles=200)) - cycles(replace(work, tiles=100))

    assert longer(SHORT) == 200
    assert longer(replace(SHORT, pace=4)) == 800
    assert longer(replace(SHORT, writes=Writes(tile=8))) == 800
    assert longer(replace(SHORT, sweeps=2, between=30)) == 400
    assert longer(replace(SHORT, x=Operand(4, 1.0, 16, 128, 0.5))) == 400
    operand = Operand(4, 1.0, 16, 128, 1.0)
    # One port gives both operands.
    assert longer(replace(SHORT, x=operand, y=operand)) == 400


def test_a_pause_puts_the_reader_ahead_by_two_words_only():
    operand = Operand(4, 2.0, 16, 128, 0.5, spacing=2)
    once = replace(SHORT, sweeps=2, between=30, behind=40, x=operand)
    # Words of the second sweep are 2 cycles apart, however long the pause before it was.
    assert cycles(replace(once, between=60)) == cycles(once) + 30
    twice = cycles(replace(once, tiles=8)) - cycles(once)
    assert twice == 2 * 4 * 2 * 2


def test_bursts_that_fit_into_a_window_come_without_a_pause():
    operand = Operand(4, 1.0, 2, 16, 0.4)
    assert operand.words(16) == 16
    assert operand.words(26) == 16 + 10 / 0.4


def test_memory_answers_in_order():
    """An operand that is asked for later comes behind the beats of what was asked for before."""
    x, y = Operand(4, 1.0, 16, 128, 1.0), Operand(40, 1.0, 2, 16, 1.0)
    beside = cycles(replace(SHORT, tiles=64, x=x, y=y))
    assert beside > cycles(replace(SHORT, tiles=64, x=x)) + 36 + 60
    # So do the operands behind the activations of a product, as far as these are asked for at once.
    behind = replace(SHORT, tiles=64, writes=Writes(tail=4000))
    few, many = (cycles(replace(LONG, words=n, outputs=16), behind) for n in (2, 1000))
    assert 100 < many - few < 128


def test_results_wait_for_the_writer():
    """Lanes take the next command while so many results wait."""
    slow = replace(SHORT, tiles=8, writes=Writes(tile=40))
    assert cycles(slow, SHORT) - cycles(slow) < 40 + 40
    longer = replace(slow, tiles=40)
    assert cycles(longer) - cycles(slow) == 32 * 40


def test_segments_of_two_sweeps_wait_between_them():
    once = replace(SHORT, sweeps=2, between=30, behind=40)
    assert cycles(replace(once, rows=(1, 1))) == cycles(once) + 2 * 8 + 30 + 40


def test_ranked_products_wait_for_all_and_hold_up_what_follows():
    ranked = replace(LONG, kind=Kind.RANKED)
    assert cycles(SHORT, ranked) > cycles(SHORT) + 4000
    assert cycles(ranked, LONG) > cycles(ranked) + 4000 + MACHINE.latency
    again = Product(words=200, outputs=32, kind=Kind.RERANKED, layer_tiles=20)
    one = replace(again, outputs=16)
    assert 200 <= cycles(ranked, again) - cycles(ranked, one) < 200 + 60


def test_descriptors_are_fetched_four_ahead():
    tiny = VectorWork(rows=(1,), tiles=1, chunk=1)
    walk = Walk(MACHINE)
    for _ in range(20):
        walk.hand_on(tiny)
    assert walk.now > 20 * (9 + MACHINE.latency) / 4


def test_a_pass_takes_some_cycles_more():
    works = [LONG, SHORT]
    draft, verify = (pass_cycles(works, MACHINE, drafts=drafts) for drafts in (True, False))
    assert walk_cycles(works, MACHINE) < draft < verify


@pytest.mark.parametrize("name", ["rows", "cols", "latency", "result_beats", "window"])
def test_impossible_machines_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Machine(**{name: 0})


def test_other_works_are_refused():
    with pytest.raises(TypeError, match="neither a product nor vector work"):
        cycles(Work())
