# SPDX-License-Identifier: Apache-2.0
"""The analytic model of speed: cycles and memory traffic of a pass, from dimensions alone.

Cycles are those of the generated engine (`speq.hw.array.gemm_engine`): a tile of `cols` outputs
takes one cycle per weight word of a column, which is K in verify mode and a quarter of K in draft
mode, but at least as many cycles as there are tokens. A pass is a sequence of *stages*, between
which the host computes: the GEMMs of a stage do not depend on each other and overlap
(`stage_cycles`), the next stage starts when all results are in memory. The host's own time is not
counted. The constants are those of the generated accelerator (`speq.hw.accelerator`), measured with
its counters.

Memory traffic is counted in three parts: weights (the planes that the pass touches), group bytes,
and the KV cache: FP16 keys and values of every position before the pass, read once per KV head, and
the entries of the pass's own tokens, written once. Norm weights, biases, the embedding's row and
activations are left out: together they are below 0.1 % of the weights.

Decoding is limited by bandwidth, so a pass costs the bytes that it streams.
`speq.model.evaluation.Costs` has them in units of a plain FP16 pass; with KV traffic the ratio
depends on the context, and speeds follow from the sums of `PassCost.bytes`.

A linear layer that has no entry in `formats` is stored as plain FP16 and read whole by every pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from speq.model.checkpoint import ModelConfig, linear_names, linear_shapes
from speq.model.number_format import FormatConfig, draft_words, residual_words
from speq.model.schedule import Linears, Scores, Stage, WeightedValues, pass_schedule, stages

Formats = Mapping[str, FormatConfig]

#: Cycles from the host's answer, or from the job before, to the next job.
_DISPATCH = 5
#: From a job to its first weight word, and from a stage's last weight word to the host's turn,
#: each without the memory's latency; the latter also without the results' way to memory.
_LOAD = 9
_STORE = 17
#: Beats by which the second plane's first words come later than the first plane's.
_BURST = 16
#: From a pass's last stage to its successor's first, without the latency: ranking, decision, fetch.
_DRAFT_END = 40
_VERIFY_END = 55
#: To find a tile of candidates, less the bits of its number, and from a tile's last weight word to
#: the end of its ranking.
_FIND = 12
_RANK = 18


@dataclass(frozen=True)
class Engine:
    """What the cycle counts depend on.

    Attributes
    ----------
    rows, cols : int
        Of the array; `cols` is also what planes and group bytes are padded to.
    fill : int
        Cycles from a command to its first weight word (`GemmEngine.FILL`).
    overhead : int
        Cycles from a tile's last weight word to its first result (`GemmEngine.OVERHEAD`; that of
        an engine that can draft).
    latency : int
        Cycles from a request to memory to its first response.
    result_beats : int
        Beats of the data port that a row of `cols` FP32 results takes.

    Raises
    ------
    ValueError
        If there is no row, no column, no latency or no beat.
    """

    rows: int = 8
    cols: int = 16
    fill: int = 2
    overhead: int = 14
    latency: int = 16
    result_beats: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "latency", "result_beats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class PassCost:
    """Cost of one pass.

    Attributes
    ----------
    weights, groups, kv : int
        Bytes of weights, group bytes and KV entries that are moved.
    linear_cycles, attention_cycles : int
        Cycles in which the linear layers and attention take weight words.
    overhead_cycles : int
        All other cycles: loading, draining and storing around each stage, starting the pass.
    """

    weights: int
    groups: int
    kv: int
    linear_cycles: int
    attention_cycles: int
    overhead_cycles: int

    @property
    def bytes(self) -> int:
        """All bytes moved."""
        return self.weights + self.groups + self.kv

    @property
    def cycles(self) -> int:
        """All cycles of the accelerator, without the host's."""
        return self.linear_cycles + self.attention_cycles + self.overhead_cycles


@dataclass(frozen=True)
class Job:
    """A GEMM of a stage.

    Attributes
    ----------
    words : int
        Weight words per column and tile.
    outputs, tokens : int
        Of the product; the tokens fit into the array's rows.
    planes : int
        From which the words are put together: 1, or 2 in verify mode.
    """

    words: int
    outputs: int
    tokens: int
    planes: int = 1


def stage_cycles(jobs: Sequence[Job], engine: Engine) -> int:
    """Cycles from the host's answer to its next turn, when all results are in memory.

    The engine holds two jobs: while one computes, the activations of the next are loaded, a word
    per cycle. The job after these is only asked for when the engine has begun to load the second.
    """
    taken, loaded, ends = 0, 0, [0, 0]
    for job in jobs:
        issue = taken + _DISPATCH
        taken = max(issue, loaded, ends[-2])
        start = max(issue + _LOAD + engine.latency, taken)
        loaded = start + job.words
        late = min(_BURST, job.words) - 1 if job.planes > 1 else 0
        tiles = -(-job.outputs // engine.cols)
        # A tile's results must be on their way before those of the next.
        tile = max(job.words, job.tokens * engine.result_beats)
        ends.append(max(start + late, ends[-1]) + tiles * tile)
    # The last tile's results are collected, then sent.
    stored = 2 * engine.result_beats * jobs[-1].tokens if jobs else 0
    return ends[-1] + _STORE + engine.latency + stored


def rerank_cycles(k: int, outputs: int, tiles: int, engine: Engine) -> int:
    """Cycles of a RERANK of `tiles` tiles of a layer [outputs, k], to the end of its ranking;
    `outputs` are those that were drafted.

    The next tile is looked for when the one before has been taken, which is when the ranking of
    that before it has ended.
    """
    find = _FIND + (-(-outputs // engine.cols) - 1).bit_length()
    issue, ranked = _DISPATCH + find, 0
    end = issue + _LOAD + engine.latency + min(_BURST, k) - 1
    for _ in range(tiles):
        start = issue + _LOAD + engine.latency
        issue = max(issue, ranked) + find
        end = max(start, end) + k
        ranked = end + _RANK
    return ranked


def uniform_formats(config: ModelConfig, number_format: FormatConfig) -> dict[str, FormatConfig]:
    """One format for all linear layers."""
    return dict.fromkeys(linear_names(config), number_format)


def gemm_cycles(steps: int, outputs: int, tokens: int, engine: Engine) -> int:
    """Cycles of a GEMM among others: `steps` weight words per column and tile, `outputs` O.

    More tokens than the array has rows take several GEMMs.
    """
    tiles = -(-outputs // engine.cols)
    batches, rest = divmod(tokens, engine.rows)
    return tiles * (batches * max(steps, engine.rows) + (max(steps, rest) if rest else 0))


def gemm_latency(steps: int, outputs: int, tokens: int, engine: Engine) -> int:
    """Cycles from the command of a GEMM, alone on the engine, to its last result.

    Raises ValueError if there are more tokens than rows.
    """
    if tokens > engine.rows:
        raise ValueError(f"{tokens} tokens do not fit into {engine.rows} rows")
    tiles = -(-outputs // engine.cols)
    # The first tile need not wait for the results of an earlier one.
    words = steps * tiles + max(0, tokens - steps) * (tiles - 1)
    return engine.fill + words - 1 + engine.overhead + tokens - 1


def kv_bytes(config: ModelConfig, context: int, tokens: int) -> int:
    """Bytes of keys and values that a pass of `tokens` rows behind `context` positions moves.

    Blocks with a sliding window read no more than its positions.
    """
    entry = 2 * 2 * config.kv_heads * config.head_dim  # a key and a value of FP16 each
    return entry * sum(_visible(config, block, context) + tokens for block in range(config.blocks))


def _visible(config: ModelConfig, block: int, context: int) -> int:
    """Earlier positions that a block's attention reads."""
    if config.sliding_window is None or config.is_global(block):
        return context
    return min(context, config.sliding_window - 1)


def plain_pass(config: ModelConfig, engine: Engine, context: int = 0, tokens: int = 1) -> PassCost:
    """A pass over plain FP16 weights: the baseline, with one token per pass.

    `context` is the number of positions before the pass's `tokens`.
    """
    return verify_pass(config, engine, {}, tokens, context)


def verify_pass(
    config: ModelConfig, engine: Engine, formats: Formats, tokens: int, context: int = 0
) -> PassCost:
    """A pass of `tokens` rows over both planes and the group bytes, behind `context` positions."""
    return _whole_pass(config, engine, formats, tokens, context, prefill=False)


def prefill_pass(
    config: ModelConfig, engine: Engine, formats: Formats, tokens: int, context: int = 0
) -> PassCost:
    """A verify pass that ends when the last block's keys and values are there."""
    return _whole_pass(config, engine, formats, tokens, context, prefill=True)


def _whole_pass(
    config: ModelConfig,
    engine: Engine,
    formats: Formats,
    tokens: int,
    context: int,
    *,
    prefill: bool,
) -> PassCost:
    """A pass over all bits of its weights."""
    schedule = stages(pass_schedule(config, prefill=prefill))
    weights = groups = 0
    jobs = {}
    for name, (o, k) in _shapes_in(schedule, config).items():
        if name in formats:
            padded = _padded(o, engine)
            words = draft_words(k) + residual_words(k)
            weights += 2 * words * padded
            groups += -(-k // formats[name].group) * padded
        else:
            weights += 2 * k * o
        jobs[name] = _jobs(k, o, tokens, engine, planes=2 if name in formats else 1)
    traffic = weights, groups
    return _pass_cost(config, engine, schedule, traffic, jobs, tokens, context, _VERIFY_END)


def draft_pass(
    config: ModelConfig,
    engine: Engine,
    formats: Formats,
    context: int = 0,
    drafted_outputs: int | None = None,
    reranked_tiles: int = 0,
) -> PassCost:
    """A pass of one token over the draft planes and their group bytes, behind `context` positions.

    With `drafted_outputs` only the head's first so many outputs are drafted, that is, only the
    lowest token ids can be proposed. `reranked_tiles` are the tiles of an encoded head that are
    then multiplied exactly: for N candidates at most N.

    Raises
    ------
    ValueError
        If drafted_outputs is not within 1 and the vocabulary's size.
    """
    if drafted_outputs is not None and not 1 <= drafted_outputs <= config.vocab_size:
        raise ValueError(
            f"drafted outputs are {drafted_outputs}; expected 1 to {config.vocab_size}"
        )
    schedule = stages(pass_schedule(config))
    weights = groups = 0
    jobs = {}
    for name, (o, k) in _shapes_in(schedule, config).items():
        if name == "head" and drafted_outputs is not None:
            o = drafted_outputs
        if name in formats:
            padded, words = _padded(o, engine), draft_words(k)
            weights += 2 * words * padded
            groups += -(-k // formats[name].group) * padded
        else:
            words = k
            weights += 2 * k * o
        jobs[name] = _jobs(words, o, 1, engine)
    traffic = weights, groups
    cost = _pass_cost(config, engine, schedule, traffic, jobs, 1, context, _DRAFT_END)
    if not reranked_tiles or "head" not in formats:
        return cost
    o, k = linear_shapes(config)["head"]
    o = o if drafted_outputs is None else drafted_outputs
    words = draft_words(k) + residual_words(k)
    outputs, busy = reranked_tiles * engine.cols, reranked_tiles * k
    return replace(
        cost,
        weights=cost.weights + 2 * words * outputs,
        groups=cost.groups + -(-k // formats["head"].group) * outputs,
        linear_cycles=cost.linear_cycles + busy,
        overhead_cycles=cost.overhead_cycles + rerank_cycles(k, o, reranked_tiles, engine) - busy,
    )


def _shapes_in(schedule: Sequence[Stage], config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape (O, K) of every linear layer of a pass by name."""
    shapes = linear_shapes(config)
    layers = (stage.names for stage in schedule if isinstance(stage, Linears))
    return {name: shapes[name] for name in chain.from_iterable(layers)}


def _padded(outputs: int, engine: Engine) -> int:
    """Output rows of an encoded tensor with the padding of its last tile."""
    return -(-outputs // engine.cols) * engine.cols


def _jobs(words: int, outputs: int, tokens: int, engine: Engine, planes: int = 1) -> list[Job]:
    """A product as jobs of no more tokens than the array has rows."""
    batches = range(0, tokens, engine.rows)
    return [Job(words, outputs, min(engine.rows, tokens - first), planes) for first in batches]


def _pass_cost(
    config: ModelConfig,
    engine: Engine,
    schedule: Sequence[Stage],
    traffic: tuple[int, int],
    linears: Mapping[str, list[Job]],
    tokens: int,
    context: int,
    end: int,
) -> PassCost:
    """The cost of a pass from its (weight bytes, group bytes) and the jobs of its linear layers.

    The query heads that share a KV head go through the array together, as tokens * sharing rows;
    the weight stream is the KV cache, in plain FP16.
    """
    c = config
    rows = tokens * (c.heads // c.kv_heads)
    # The hardware walks through all entries; those outside a sliding window are left out later.
    seen = context + tokens
    attention_cycles = cycles = 0
    for stage in schedule:
        match stage:
            case Linears(names):
                jobs = [job for name in names for job in linears[name]]
            case Scores():
                jobs = c.kv_heads * _jobs(c.head_dim, seen, rows, engine)
            case WeightedValues():
                jobs = c.kv_heads * _jobs(seen, c.head_dim, rows, engine)
        if not isinstance(stage, Linears):
            attention_cycles += _busy_cycles(jobs, engine)
        cycles += stage_cycles(jobs, engine)
    linear_cycles = _busy_cycles(chain.from_iterable(linears.values()), engine)
    cycles += end + engine.latency
    return PassCost(
        *traffic,
        kv_bytes(c, context, tokens),
        linear_cycles,
        attention_cycles,
        cycles - linear_cycles - attention_cycles,
    )


def _busy_cycles(jobs: Iterable[Job], engine: Engine) -> int:
    """Cycles in which the array takes weight words."""
    return sum(gemm_cycles(job.words, job.outputs, job.tokens, engine) for job in jobs)
