# SPDX-License-Identifier: Apache-2.0
"""The model of a pass's cycles: what its descriptors take, in the order of its program.

A program is a list of *works*, products of the array (`Product`) and vector operations
(`VectorWork`), which the program walker hands on one after the other. Each unit takes the next work
when it has done its share of the one before: the array and its loader, and of the vector unit the
sequencer, the readers of both operands, the lanes and the writer. A work may also wait for others
whose results are to be in memory. So the model follows the order, the waits and the overlaps of any
program. `speq.host.cycles` says what the descriptors of a program are for it.

Memory answers after `Machine.latency` cycles, scratch memory sooner, each in the order in which it
is asked. So the two operands of a vector operation hold up one another if both come from the same
of the two, and activations that the array's loader has asked for hold up those. What is written
holds up nothing.

The constants below are cycles of the generated accelerator's units, in pipelines and state machines
that no parameter changes; each was measured with programs of one descriptor
(`speq.host.program_meter`). What depends on parameters comes with the works.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

#: Descriptors that the walker fetches ahead (`speq.hw.control.program_walker`).
_AHEAD = 4
#: From asking for a descriptor to having it, without the memory's latency: `MemoryReader`,
#: `ReadArbiter`, the buffer behind them.
_FETCH = 9
#: From having a descriptor, and having handed on the one before, to offering its work: states FETCH
#: and CHECK of the walker.
_CHECK = 3
#: From a job to its first weight word, without the memory's latency: `Datapath`, `WeightReader`,
#: `PlaneMerger`.
_LOAD = 9
#: Beats by which the second plane's first words come later than the first plane's: a burst.
_BURST = 16
#: From a product's last weight word to the answer to its last write, without the memory's latency
#: and the results' own beats: array, rounder, `ResultWriter`, `MemoryWriter`.
_STORE = 15
#: From a ranked product's last weight word to the end of its ranking: array, rounder, `Ranker`.
_RANK = 42
#: To find a tile of candidates, less the bits of its number (`CandidateTiles`), and from its last
#: weight word to the end of its ranking.
_FIND, _RERANK = 12, 18
#: From a vector operation's command to those of its parts: states MEASURE, SHAPE and HAND of the
#: `VectorUnit`.
_SHAPE = 3
#: From the command of the lanes to their first word: states SET and RUN of the `VectorCore`.
_BEGIN = 3
#: Results that are on their way or wait for the writer, in the `VectorCore`.
_RESULTS = 32
#: From an operand's first transfer to its first word, without the memory's latency: `MemoryReader`,
#: `WordPacker`.
_READ = 7
#: From an operand's last word to its reader's next command.
_GIVEN = 2
#: From the last piece of a vector operation's results to the answer to its write, without the
#: memory's latency: `WriteCombiner`, `WriteMux`, `MemoryWriter`.
_ANSWER = 17
#: From the start of a pass to the first descriptor, and from the end of its walk to the start of
#: the next pass, of which a verify pass also chooses what is committed: `SpeculationController`.
_DRAFT_STEP, _VERIFY_STEP = 20, 30


class PassCycles(Protocol):
    """Cycles of the passes of a model on an accelerator; `context` are the KV entries before."""

    @property
    def rows(self) -> int:
        """Of the array."""
        ...

    def plain(self, context: int = 0) -> int:
        """Of a pass of one token over plain FP16 weights."""
        ...

    def draft(self, context: int = 0, reranked_tiles: int = 0) -> int:
        """Of a draft pass that computes so many tiles of the head exactly."""
        ...

    def verify(self, tokens: int, context: int = 0) -> int:
        """Of a verify pass of so many rows."""
        ...

    def prefill(self, tokens: int, context: int = 0) -> int:
        """Of a pass of so many rows that only fills the KV cache."""
        ...


class Kind(Enum):
    """What a product's results are for."""

    PLAIN = auto()
    RANKED = auto()
    #: Tiles with candidates, which are ranked anew.
    RERANKED = auto()


@dataclass(frozen=True)
class Machine:
    """What cycles depend on besides the program.

    Attributes
    ----------
    rows, cols : int
        Of the array.
    latency : int
        Cycles from a request to memory to its first response.
    result_beats : int
        Beats of the data port that a row of `cols` FP32 results takes.
    word_beats : float
        Beats of the data port that a word of activations takes.
    window : int
        Beats that a reader of the data port asks for before the first of them comes.
    reads, writes : tuple of int, optional
        Cycles from a request on the data port, or a write's last beat, to the first response, of
        memory and of scratch memory; `latency` when not given.
    pace : float
        Cycles from one weight word of all columns to the next: 1, or more where the weights' port
        or the memory behind it gives less than a word per cycle, for which the array waits.

    Raises
    ------
    ValueError
        If there is no row, no column, no latency or no beat, or if weights come too fast.
    """

    rows: int = 8
    cols: int = 16
    latency: int = 16
    result_beats: int = 2
    word_beats: float = 0.5
    window: int = 128
    reads: tuple[int, int] | None = None
    writes: tuple[int, int] | None = None
    pace: float = 1.0

    def read(self, on_chip: bool = False) -> int:
        """Cycles from a request on the data port to the first response."""
        return self.latency if self.reads is None else self.reads[on_chip]

    def written(self, on_chip: bool = False) -> int:
        """Cycles from a write's last beat to its response."""
        return self.latency if self.writes is None else self.writes[on_chip]

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "latency", "result_beats", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.pace >= 1:
            raise ValueError(f"pace is {self.pace}; the array takes a word per cycle at most")

    def words(self, count: int) -> int:
        """Cycles in which so many weight words come."""
        return math.ceil(count * self.pace)


@dataclass(frozen=True)
class Work:
    """What is handed on.

    Attributes
    ----------
    products, vectors : int, optional
        It starts when all products, or vector operations, before it but the last so many are
        finished; None: it does not wait for them.
    """

    products: int | None = None
    vectors: int | None = None


@dataclass(frozen=True)
class Product(Work):
    """A product of the array.

    Attributes
    ----------
    words : int
        Weight words per column and tile.
    outputs, tokens : int
        Of the product; more tokens than the array has rows are several jobs.
    planes : int
        From which the words are put together: 1, or 2 in verify mode.
    kind : Kind
        Ranked products wait for all before them. RERANKED ones have a job for each tile.
    layer_tiles : int
        Of RERANKED ones: tiles of the layer in which theirs are looked for.
    loads_on_chip, stores_on_chip : bool
        Activations are in scratch memory, and results.
    """

    words: int = 1
    outputs: int = 1
    tokens: int = 1
    planes: int = 1
    kind: Kind = Kind.PLAIN
    layer_tiles: int = 1
    loads_on_chip: bool = False
    stores_on_chip: bool = False


@dataclass(frozen=True)
class Operand:
    """How an operand of a vector operation comes from memory.

    Attributes
    ----------
    first : int
        Cycles from the reader's command to its first transfer.
    beats : float
        Of the data port for each word of lanes.
    burst, window : int
        Beats of a burst, and of all that are under way at once.
    rate : float
        Words per cycle that these allow, at most 1: so many come without a pause, and as many for
        each round trip.
    spacing : int
        Cycles from a word to the next one as the reader puts them together, however early their
        beats have come.
    on_chip : bool
        It is in scratch memory.
    """

    first: int
    beats: float
    burst: int
    window: int
    rate: float
    spacing: int = 1
    on_chip: bool = False

    def words(self, count: int) -> float:
        """Cycles in which so many come, from when the first one could."""
        at_once = min(count, self.window / self.beats)
        return at_once * self.spacing + (count - at_once) / self.rate

    def ahead(self, words: int, cycles: int) -> float:
        """Beats of so many words that are asked for in so many cycles, a burst in each."""
        return min(words * self.beats, self.window, (cycles + 1) * self.burst)


@dataclass(frozen=True)
class Writes:
    """How results of a vector operation go to memory, tile by tile. The writer holds two tiles.

    Attributes
    ----------
    lead, passing : int
        Cycles from a tile's last result to the first of its pieces, and of the pipeline behind
        these.
    tile : float
        Cycles for the pieces of a tile, on average.
    tail : int
        From the last piece to that on its way: beats of a burst are sent when all are there.
    on_chip : bool
        They go to scratch memory.
    """

    lead: int = 0
    tile: float = 0
    passing: int = 0
    tail: int = 0
    on_chip: bool = False


@dataclass(frozen=True)
class VectorWork(Work):
    """A vector operation.

    It goes through segments, in one sweep or in two through each, of which the last gives results:
    tile by tile, row by row, word by word.

    Attributes
    ----------
    rows : tuple of int
        Of each segment.
    tiles, chunk : int
        Of each segment, and words of a row in a tile.
    x : Operand
    y : Operand, optional
        Taken in the last sweep only.
    sweeps : int
    alone : bool
        It begins when all vector work before it is finished, and what follows when it is.
    setup, ready : int
        Cycles that finding its shape takes, and from the lanes' command to their first word,
        besides the usual ones.
    pace : int
        Cycles from a word to the next one, of the last sweep.
    between, behind : int
        From a sweep's last word to the next sweep's first, and from the last word of a segment with
        two sweeps, or of all, to the next one's first or the next command.
    result : int
        From a word to its result at the writer.
    writes : Writes
    """

    rows: tuple[int, ...] = (1,)
    tiles: int = 1
    chunk: int = 1
    x: Operand = Operand(0, 1.0, 1, 1, 1.0)
    y: Operand | None = None
    sweeps: int = 1
    alone: bool = False
    setup: int = 0
    ready: int = 0
    pace: int = 1
    between: int = 0
    behind: int = 0
    result: int = 0
    writes: Writes = Writes()


class Walk:
    """The units' times while the works of a pass are handed on, from 0 on.

    Parameters
    ----------
    machine : Machine

    Attributes
    ----------
    now : int
        When the last work was handed on.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.now = 0
        self._fetch = _FETCH + machine.read()
        #: When each of the descriptors that are fetched ahead was asked for, the next one first.
        self._asked = deque([0] * _AHEAD, _AHEAD)
        # When all products, or vector operations, up to each are finished.
        self._products, self._vectors = [0], [0]
        # Of the array: when the last job's activations are loaded, and the last two are computed.
        self._loaded = 0
        self._computed = [0, 0]
        # When all that its loader had asked for at once has come, from memory and from scratch
        # memory.
        self._there = [0, 0]
        # When parts of the vector unit take the next command.
        self._sequencer = self._x = self._y = self._lanes = self._writer = 0

    @property
    def idle(self) -> int:
        """When all results are in memory."""
        return max(self._products[-1], self._vectors[-1])

    def hand_on(self, work: Work) -> int:
        """The next work of the program; when its results are in memory."""
        start = self._next()
        for finished, left in ((self._products, work.products), (self._vectors, work.vectors)):
            if left is not None:
                start = max(start, finished[max(0, len(finished) - 1 - left)])
        match work:
            case VectorWork():
                end, finished = self._vector(work, start), self._vectors
            case Product(kind=Kind.RERANKED):
                end, finished = self._rerank(work, max(start, self.idle)), self._products
            case Product():
                end, finished = self._product(work, start), self._products
            case _:
                raise TypeError(f"{work} is neither a product nor vector work")
        finished.append(max(finished[-1], end))
        self._asked.append(self.now)
        return end

    def end(self) -> int:
        """When the walk ends behind the last work."""
        return max(self._next(), self.idle)

    def _next(self) -> int:
        """When the next descriptor has been checked."""
        return max(self.now + 1, self._asked[0] + self._fetch) + _CHECK

    # The array.

    def _product(self, work: Product, start: int) -> int:
        rows, is_ranked = self._machine.rows, work.kind is not Kind.PLAIN
        self.now = max(start, self.idle) if is_ranked else start
        stored = 0
        # The activations of all jobs are asked for as soon as there is room for them.
        beats = -(-work.tokens // rows) * work.words * self._machine.word_beats
        place = work.loads_on_chip
        comes = max(self._there[place], self.now + _LOAD + self._machine.read(place))
        self._there[place] = comes + int(min(beats, self._machine.window))
        for first in range(0, work.tokens, rows):
            stored = self._job(work, min(rows, work.tokens - first))
        if is_ranked:
            self.now = stored = max(stored, self._computed[-1] + _RANK)
        return stored

    def _job(self, work: Product, tokens: int) -> int:
        """A job that is offered now; when its results are in memory.

        The engine holds two jobs: while one computes, the activations of the next are loaded, a
        word per cycle. The job after these is only taken when the engine has begun to load the
        second.
        """
        machine = self._machine
        taken = max(self.now, self._loaded, self._computed[0])
        start = max(self.now + _LOAD + machine.latency, taken)
        late = min(_BURST, work.words) - 1 if work.planes > 1 else 0
        # Results of a tile, and a cycle before them (`ResultWriter`), are on their way before those
        # of the next.
        tile = max(machine.words(work.words), tokens * machine.result_beats + 1)
        tiles = -(-work.outputs // machine.cols)
        end = max(start + late, self._computed[1]) + tiles * tile
        self._loaded = start + work.words
        self._computed = [self._computed[1], end]
        self.now = taken + 1
        # The last tile's results are collected, then sent.
        answer = machine.written(work.stores_on_chip)
        return end + _STORE + answer + 2 * machine.result_beats * tokens

    def _rerank(self, work: Product, start: int) -> int:
        """Tiles one after the other. The next one is looked for when the one before has been taken,
        which is when the ranking of that before it has ended."""
        load = _LOAD + self._machine.latency
        find = _FIND + (work.layer_tiles - 1).bit_length()
        issue, ranked = start + find, 0
        end = issue + load + min(_BURST, work.words) - 1
        for _ in range(-(-work.outputs // self._machine.cols)):
            begin = issue + load
            issue = max(issue, ranked) + find
            end = max(begin, end) + self._machine.words(work.words)
            ranked = end + _RERANK
        self.now = ranked
        return ranked

    # The vector unit.

    def _vector(self, work: VectorWork, start: int) -> int:
        machine = self._machine
        x, y, out = work.x, work.y, work.writes
        self.now = start = max(start, self._sequencer)
        handed = start + _SHAPE + work.setup
        if work.alone:
            handed = max(handed, self._vectors[-1] + 1)
        takes_x = max(handed, self._x)
        takes_y = max(handed, self._y) if y else handed
        begins, writes = max(handed, self._lanes), max(handed, self._writer)
        self._sequencer = max(takes_x, takes_y, begins, writes) + 1

        # When the first word of each could be there.
        # Behind what the array's loader has asked for, where both are in the same memory.
        x_there = port = max(
            takes_x + x.first + _READ + machine.read(x.on_chip), self._there[x.on_chip]
        )
        y_there = 0
        shares = y is not None and y.on_chip == x.on_chip
        if y:
            y_there = max(
                takes_y + y.first + _READ + machine.read(y.on_chip), self._there[y.on_chip]
            )
            port = min(x_there, y_there)
            if shares and work.sweeps == 1:
                # What the other operand has asked for comes first, too.
                words, later = sum(work.rows) * work.tiles * work.chunk, y_there - x_there
                if later >= 0:
                    y_there = max(y_there, x_there + int(x.ahead(words, later)))
                else:
                    x_there = max(x_there, y_there + int(y.ahead(words, -later)))
        time = float(begins + _BEGIN + work.ready)  # of the next word
        time = max(time, x_there, y_there if work.sweeps == 1 else 0)
        last = time
        # When the reader has put together the words so far. It holds a word and all but a beat of
        # the next one, so it is not ahead by more however long a pause was.
        supplied, ahead = 0.0, 2 * (x.spacing - 1)
        x_count = y_count = 0
        drained = [0.0, 0.0]  # when the last two tiles have left the places that they waited in
        # Tiles with results that the last words may have to wait for: words up to each tile's end,
        # and when the last of them was at the writer.
        waiting: deque[tuple[int, float]] = deque()
        results = 0
        for rows in work.rows:
            size = rows * work.chunk
            for sweep in range(work.sweeps):
                gives = sweep == work.sweeps - 1
                for _ in range(work.tiles):
                    x_count += size
                    supplied = max(supplied, time - ahead) + size * x.spacing
                    pace = work.pace if gives else 1
                    time = max(time + size * pace, supplied, x_there + x.words(x_count))
                    if not gives:
                        continue
                    if y:
                        y_count += size
                        time = max(time, y_there + y.words(y_count))
                        if shares:
                            time = max(time, port + x_count * x.beats + y_count * y.beats)
                    results += size
                    free = max(drained[0], writes) + size
                    waiting.append((results, free))
                    while waiting[0][0] < results - _RESULTS:
                        waiting.popleft()
                    count, there = waiting[0]
                    time = max(time, there - (count - (results - _RESULTS)))
                    filled = max(time + work.result, free)
                    waiting[-1] = results, filled
                    drained = [drained[1], max(filled + out.lead, drained[1]) + out.tile]
                last = time
                if work.sweeps > 1:
                    time += work.behind if gives else work.between
        if work.sweeps == 1:
            time += work.behind
        self._x, self._lanes = int(last) + _GIVEN, int(time)
        self._y = self._x if y else self._y
        self._writer = int(drained[1]) + 1
        end = int(drained[1]) + out.passing + out.tail + _ANSWER + machine.written(out.on_chip)
        if work.alone:
            self._sequencer = end + 1
        return end


def walk_cycles(program: Iterable[Work], machine: Machine) -> int:
    """Cycles of a walk through a program."""
    walk = Walk(machine)
    for work in program:
        walk.hand_on(work)
    return walk.end()


def pass_cycles(program: Iterable[Work], machine: Machine, *, drafts: bool) -> int:
    """Cycles of a pass of a run that decodes, from its start to that of the next one."""
    return walk_cycles(program, machine) + (_DRAFT_STEP if drafts else _VERIFY_STEP)
