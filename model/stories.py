# SPDX-License-Identifier: Apache-2.0
"""Short simple stories from a grammar: unlimited training and evaluation text from a seed.

The grammar's text is `stories.json` beside this file. A story is an opening, details of its hero, a
plot and an ending. Each is a beat or, as the plots, several; a beat is a list of variants, of which
one is taken. A variant is a sentence or several, in a small notation:

    {one|two|}    one of the alternatives, which may be empty or hold further ones
    $name         a slot: the same value wherever it occurs in a story (hero, place, thing ...), or
                  one of the grammar's rules, drawn anew each time; `$Name` starts it with a capital

"meets_friend" are the plots in which the hero's friend appears for the first time.

Everything is drawn with `random.Random.random`, whose sequence Python promises to keep, so a seed
gives the same story everywhere. Odd seeds are the held-out split: training never sees them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random

_GRAMMAR = json.loads(Path(__file__).with_name("stories.json").read_text("utf-8"))


def _pick(rng: Random, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def _two(rng: Random, options: Sequence[str]) -> tuple[str, str]:
    """Two different options."""
    first = _pick(rng, options)
    return first, _pick(rng, [option for option in options if option != first])


def _slots(rng: Random, plot: str) -> dict[str, str]:
    """What stays the same throughout one story: hero, friend, family, places, things."""
    gender, friend_gender, elder_gender = (_pick(rng, ("girl", "boy")) for _ in range(3))
    names, animals = _GRAMMAR["names"], _GRAMMAR["animals"]
    hero = _pick(rng, names[gender])
    friends = [name for name in names[friend_gender] if name != hero]
    kind = _pick(rng, animals) if rng.random() < 0.4 else gender
    friend_kind, other_kind = _two(rng, [animal for animal in animals if animal != kind])
    preposition = _pick(rng, _GRAMMAR["prepositions"])
    place, other_place = _two(rng, _GRAMMAR["places"][preposition])
    thing, other_thing = _two(rng, _GRAMMAR["things"])
    food, other_food = _two(rng, _GRAMMAR["foods"])
    color, other_color = _two(rng, _GRAMMAR["colors"])
    slots = {
        "hero": hero,
        "kind": kind,
        "friend": _pick(rng, friends),
        "fkind": friend_kind,
        "fkind2": other_kind,
        "elder": _pick(rng, _GRAMMAR["elders"][elder_gender]),
        "place": place,
        "place2": other_place,
        "at": f"{preposition} the {place}",
        "at2": f"{preposition} the {other_place}",
        "noun": thing,
        "noun2": other_thing,
        "thing": f"{_pick(rng, (color, *_GRAMMAR['looks']))} {thing}",
        "thing2": f"{_pick(rng, (other_color, *_GRAMMAR['looks']))} {other_thing}",
        "food": food,
        "food2": other_food,
        "crop": _pick(rng, _GRAMMAR["crops"]),
        "color": color,
        "color2": other_color,
        "fear": _pick(rng, _GRAMMAR["fears"]),
        "moral": _GRAMMAR["morals"][plot],
    }
    for prefix, owner in (("", gender), ("f", friend_gender), ("e", elder_gender)):
        for role, word in zip(("he", "him", "his"), _GRAMMAR["pronouns"][owner], strict=True):
            slots[prefix + role] = word
    return slots


def expand(text: str, slots: Mapping[str, str], rng: Random) -> str:
    """`text` with its alternatives drawn and its slots filled; KeyError names an unknown slot."""
    while found := re.search(r"\{([^{}]*)\}|\$(\w+)", text):
        if found[2] is None:
            value = _pick(rng, found[1].split("|"))
        else:
            name = found[2][0].lower() + found[2][1:]
            value = slots[name] if name in slots else _GRAMMAR["rules"][name]
            if name != found[2]:
                value = value[0].upper() + value[1:]
        text = text[: found.start()] + value + text[found.end() :]
    return text


def _polish(text: str) -> str:
    """Single spaces, "an" before vowels, capitals at the start of sentences."""
    text = re.sub(r" +([ ,.!?])", r"\1", text).strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^\"?|[.!?] |\.\" )([a-z])", lambda m: m[1] + m[2].upper(), text)


def story(seed: int) -> str:
    """The story of a seed >= 0: about 90 to 180 words, without a line break."""
    rng = Random(seed)
    plot = _pick(rng, list(_GRAMMAR["plots"]))
    slots = _slots(rng, plot)
    lines = [_pick(rng, _GRAMMAR["openings"]), *_two(rng, _GRAMMAR["details"])]
    if plot not in _GRAMMAR["meets_friend"]:
        lines.append(_pick(rng, _GRAMMAR["companions"]))
    middle = [_pick(rng, beat) for beat in _GRAMMAR["plots"][plot]]
    if rng.random() < 0.7:
        middle.insert(1 + int(rng.random() * (len(middle) - 1)), _pick(rng, _GRAMMAR["asides"]))
    lines += middle
    if rng.random() < 0.5:
        lines.append(_pick(rng, _GRAMMAR["lessons"]))
    lines.append(_pick(rng, _GRAMMAR["endings"]))
    return " ".join(_polish(expand(line, slots, rng)) for line in lines)


def training_stories() -> Iterator[str]:
    """Stories to train on, without end."""
    return (story(seed) for seed in count(0, 2))


def held_out_stories() -> Iterator[str]:
    """Stories to evaluate on, without end."""
    return (story(seed) for seed in count(1, 2))
