# SPDX-License-Identifier: Apache-2.0
"""Predicted cycles of passes: what the descriptors of their programs take on an accelerator.

`speq.model.pass_cycles` is the model. Here descriptors become its works: sizes are those of the
descriptors, latencies those of the units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from speq.host.checks import check_vector_unit, default_capacity
from speq.host.layout import Region, ceil_div
from speq.host.programs import ModelLayout
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.descriptor import Descriptor, DescriptorKind, Target, VectorOperation
from speq.hw.engine_config import DRAFT_LANES, FP16_BITS, EngineConfig, Mode
from speq.hw.memory.axi import AxiConfig
from speq.hw.memory.read_router import ReadRouter
from speq.hw.memory.scratch_memory import ScratchMemory
from speq.hw.memory.write_router import WriteRouter
from speq.hw.vector.activation_quantizer import words_at_once
from speq.hw.vector.attention_mask import AttentionMask
from speq.hw.vector.command import BY_CHANNEL, ON_BATCHES, TWICE
from speq.hw.vector.lane import LATENCIES, PACES, LaneOperation
from speq.hw.vector.operand_requests import OperandMode, OperandRequests
from speq.hw.vector.partial_sums import PARTIAL_SUMS
from speq.hw.vector.row_values import FACTOR_LATENCY, maximum_latency, reciprocal_latency
from speq.hw.vector.run_planner import line_places
from speq.hw.vector.vector_core import BINARY
from speq.hw.vector.word_counter import words_per_row
from speq.model.checkpoint import ModelConfig
from speq.model.cycles import Formats
from speq.model.number_format import FormatConfig, draft_words
from speq.model.pass_cycles import (
    Kind,
    Machine,
    Operand,
    Product,
    VectorWork,
    Work,
    Writes,
    pass_cycles,
    walk_cycles,
)

_FP32_BITS = 32
_BYTE = 8
_NO_WINDOW = Region(0, 0)

#: What a lane does for the results of an operation.
_LANE = {
    VectorOperation.EMBED: LaneOperation.SCALE,
    VectorOperation.ADD: LaneOperation.ADD_SCALED,
    VectorOperation.MULTIPLY: LaneOperation.SCALE_TWICE,
    VectorOperation.NORM: LaneOperation.SCALE_TWICE,
    VectorOperation.ROTATE: LaneOperation.ROTATE,
    VectorOperation.ROUND: LaneOperation.SCALE,
    VectorOperation.GATE: LaneOperation.GATE,
    VectorOperation.SIGMOID_GATE: LaneOperation.GATE,
    VectorOperation.SOFTMAX: LaneOperation.EXPONENTIAL,
    VectorOperation.NORMALIZE: LaneOperation.SCALE,
}

# Of the VectorCore: cycles from taking a word to its operands at the lanes; to a sum that the next
# one may be added to; and between the last word of a command and the first of the next.
_ISSUE = 2
_ADDED = _ISSUE + LATENCIES[LaneOperation.ADD_SCALED] + 1
_PAUSE = _ISSUE + max(LATENCIES.values()) + 2
#: From a lane's result to the word at the writer: masks, FP16 numbers, the buffer of results.
_RESULT = 6
#: Cycles of the round trip of a burst besides its beats and the memory's latency, which limits
#: short bursts.
_ROUND_TRIP = 3
#: Of the writer: from a tile's last word to its first lines, and of the pipeline behind its last
#: ones (`RunPlanner`, `Transposer`); of a run of lines, and of a tile besides. What goes on
#: as it is comes sooner.
_LEAD, _PASSING, _PASSING_ON = 4, 8, -3
_RUN, _TILE = 3, 1
#: From a block's last activation to its first draft word (`BlockQuantizer`): of QUANTIZE, and of
#: results that are quantised; of QUANTIZE from the command to the first request (`TileReader`).
_QUANTIZED, _DRAFTED, _REQUEST = 8, 3, 4
#: To fetch the tokens of a pass from memory, without the memory's latency (`TokenReader`).
_TOKENS = 18


def machine(config: AcceleratorConfig, latency: int, weight_bits: float | None = None) -> Machine:
    """What the cycles of an accelerator depend on, with memory of this latency that gives so many
    bits of weights per cycle, by default as many as the port takes."""
    engine = config.engine
    beats = max(1, _FP32_BITS * engine.cols // config.data.data_bits)
    word = _BYTE * config.activation_bytes / config.data.data_bits
    window = min(config.data.outstanding * config.data.burst_beats, config.data.depth)
    reads = writes = None
    if config.scratch:
        reads = (
            ReadRouter.LATENCY + latency,
            ReadRouter.LATENCY + ScratchMemory.READ_LATENCY,
        )
        writes = (
            WriteRouter.BEAT_LATENCY + latency,
            WriteRouter.BEAT_LATENCY + ScratchMemory.WRITE_LATENCY,
        )
    given = config.weights.data_bits
    given = given if weight_bits is None else min(given, weight_bits)
    pace = max(1.0, FP16_BITS * engine.cols / given)
    sizes = (engine.rows, engine.cols, latency, beats, word, window)
    return Machine(*sizes, reads, writes, pace)


@dataclass(frozen=True)
class WorkOf:
    """What descriptors are for the model of cycles, in a pass.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.
    rows, position : int
        Rows of the pass, and KV entries before it.
    latency : int
        Of the memory.
    reranked_tiles : int
        Tiles that a RERANK finds.
    token : int
        A usual token of the model: the product with it takes a cycle for each of its bits.
    in_text : bool
        The tokens of the pass are those of a text in memory.
    scratch : Region
        The window of the scratch memory.
    """

    config: AcceleratorConfig
    rows: int
    position: int
    latency: int
    reranked_tiles: int = 0
    token: int = 0
    in_text: bool = False
    scratch: Region = _NO_WINDOW

    @cached_property
    def _machine(self) -> Machine:
        return machine(self.config, self.latency)

    def _on_chip(self, address: int) -> bool:
        """Whether what begins at an address is in scratch memory."""
        return self.scratch.start <= address < self.scratch.stop

    def program(self, descriptors: Iterable[Descriptor]) -> list[Work]:
        """The works of a program, without its END."""
        works, ranked = [], 0
        for d in descriptors:
            if d.kind is DescriptorKind.END:
                continue
            works.append(self.work(d, ranked))
            if d.kind is DescriptorKind.ARGMAX:
                ranked = d.o
        return works

    def work(self, d: Descriptor, ranked: int = 0) -> Work:
        """That of a descriptor; of RERANK with so many outputs ranked before it.

        Raises
        ------
        ValueError
            If it is END, or of a kind whose cycles are not the accelerator's alone.
        """
        match d.kind:
            case DescriptorKind.VECTOR:
                return self._vector(d)
            case DescriptorKind.GEMM | DescriptorKind.ARGMAX | DescriptorKind.RERANK:
                return self._placed(self._linear(d, ranked), d)
            case DescriptorKind.ATTENTION:
                k, o = (self._seen, d.o) if d.values else (d.k, self._seen)
                tokens = self.rows * d.sharing
                return self._placed(Product(*_waits(d), words=k, outputs=o, tokens=tokens), d)
            case _:
                raise ValueError(f"the cycles of {d.kind.name} cannot be predicted")

    @property
    def _seen(self) -> int:
        return self.position + self.rows

    def _placed(self, product: Product, d: Descriptor) -> Product:
        """A product with where its activations and its results are."""
        return replace(
            product,
            loads_on_chip=self._on_chip(d.activations),
            stores_on_chip=self._on_chip(d.results),
        )

    # Products.

    def _linear(self, d: Descriptor, ranked: int) -> Product:
        cols = self.config.engine.cols
        tokens = d.tokens or self.rows
        if d.kind is DescriptorKind.RERANK:
            return Product(
                words=d.k,
                outputs=self.reranked_tiles * cols,
                planes=2,
                kind=Kind.RERANKED,
                layer_tiles=max(1, ceil_div(ranked, cols)),
            )
        return Product(
            *_waits(d),
            words=draft_words(d.k) if d.mode is Mode.DRAFT else d.k,
            outputs=d.o,
            tokens=tokens,
            planes=2 if d.mode is Mode.VERIFY else 1,
            kind=Kind.RANKED if d.kind is DescriptorKind.ARGMAX else Kind.PLAIN,
        )

    # Vector work.

    def _vector(self, d: Descriptor) -> VectorWork:
        operation = VectorOperation(d.operation)
        if operation is VectorOperation.QUANTIZE:
            return self._quantize(d)
        if operation not in _LANE:
            raise ValueError(f"the cycles of {operation.name} cannot be predicted")
        engine = self.config.engine
        if operation in ON_BATCHES:
            n = self.rows * d.sharing
            rows = tuple(min(engine.rows, n - i) for i in range(0, n, engine.rows))
        else:
            rows = (self.rows,) * d.o
        elements = self._seen if operation is VectorOperation.SOFTMAX else d.k
        tiles = ceil_div(elements, engine.cols)
        lane = LATENCIES[_LANE[operation]]
        ready = between = 0
        behind = _PAUSE
        if operation is VectorOperation.NORM:
            between = _ADDED + 3 + self._adding_up()
        elif operation is VectorOperation.SOFTMAX:
            ready = AttentionMask.ROW_CYCLES * self.rows  # their masks
            scored = LATENCIES[LaneOperation.SCALE] + maximum_latency(self.config)
            between = _ISSUE + 2 + scored
            behind = _ISSUE + 2 + lane + reciprocal_latency(self.config)
        x, y = self._operands(d, rows, tiles)
        setup = len(rows) if operation in ON_BATCHES else 0
        fetches = operation is VectorOperation.EMBED and self.in_text
        if fetches:
            setup = _TOKENS + self._machine.read()
        return VectorWork(
            *_waits(d),
            rows=rows,
            tiles=tiles,
            chunk=words_per_row(self.config),
            x=x,
            y=y,
            sweeps=2 if operation in TWICE else 1,
            alone=fetches,
            setup=setup,
            ready=ready,
            pace=PACES[_LANE[operation]],
            between=between,
            behind=behind,
            result=_ISSUE + lane + _RESULT,
            writes=replace(
                self._writes(d, rows, elements, tiles), on_chip=self._on_chip(d.results)
            ),
        )

    def _adding_up(self) -> int:
        """Cycles in which the partial sums of a NORM's rows become factors: words are added to
        words, then halves of a word, and at last the factor is found."""
        lanes = self.config.lanes
        counts, pairs, distance = [], PARTIAL_SUMS // lanes // 2, lanes // 2
        while pairs:
            counts.append(pairs * self.rows)
            pairs //= 2
        while distance:
            counts.append(self.rows)
            distance //= 2
        levels = sum(count + _ADDED - 1 for count in counts)
        return levels + self.rows + _ADDED + FACTOR_LATENCY - 1

    def _operands(
        self, d: Descriptor, rows: tuple[int, ...], tiles: int
    ) -> tuple[Operand, Operand | None]:
        operation = VectorOperation(d.operation)
        x_place, y_place = self._on_chip(d.first), self._on_chip(d.second)
        if operation is VectorOperation.EMBED:
            x = self._operand(OperandMode.ROWS, rows, tiles, x_place, self.token, half=True)
            return x, None
        x = self._operand(OperandMode.TILES, rows, tiles, x_place)
        if operation not in BINARY:
            return x, None
        if operation is VectorOperation.ROTATE:
            return x, self._operand(OperandMode.ROWS, rows, tiles, y_place, self.position)
        by_channel = operation in BY_CHANNEL and d.values
        mode = OperandMode.CHANNELS if by_channel else OperandMode.TILES
        return x, self._operand(mode, rows, tiles, y_place)

    def _operand(
        self,
        mode: OperandMode,
        rows: tuple[int, ...],
        tiles: int,
        on_chip: bool,
        index: int = 0,
        half: bool = False,
    ) -> Operand:
        """An operand of segments of so many rows and tiles, in scratch memory or not; in mode ROWS
        of rows with such an index."""
        config, port = self.config, self.config.data
        bits = FP16_BITS if half else _FP32_BITS
        chunk = max(1, config.engine.cols * bits // port.data_bits)  # beats of a row in a tile
        if mode is OperandMode.ROWS:
            factors, beats = [max(index, 1)] * self.rows, chunk
        else:
            # Of the last segment, and of the others if there are any.
            counts = {rows[-1]} if len(rows) == 1 else (rows[0], rows[-1])
            factors = [1 if mode is OperandMode.CHANNELS else count for count in counts]
            beats = factors[0] * tiles * chunk
        first = OperandRequests.LATENCY + sum(
            OperandRequests.PRODUCT_LATENCY + factor.bit_length() for factor in factors
        )
        burst = min(port.burst_beats, beats)
        per_word = bits * config.lanes / port.data_bits
        window = min(port.outstanding * burst, port.depth)
        given = min(1.0, port.data_bits / (bits * config.lanes))
        round_trip = self._machine.read(on_chip) + burst + _ROUND_TRIP
        rate = min(given, window / per_word / round_trip)
        if mode is OperandMode.CHANNELS:  # the other rows' words are kept
            per_word /= self.rows
        return Operand(first, per_word, burst, window, rate, round(1 / given), on_chip)

    def _writes(self, d: Descriptor, rows: tuple[int, ...], elements: int, tiles: int) -> Writes:
        """What the writer does with the results."""
        config, port = self.config, self.config.data
        target, cols = Target(d.target), config.engine.cols
        if target is Target.DRAFT_ACTIVATIONS:
            return self._writes_drafts(elements)
        if target in (Target.TILES, Target.VALUES):
            bits = FP16_BITS if target is Target.VALUES else _FP32_BITS
            word = bits * config.lanes  # beats of each, or words of a beat
            slow = max(1, word // port.data_bits) - 1
            in_order = 1 if target is Target.VALUES else sum(rows) * tiles
            beats = max(1, in_order * cols * bits // port.data_bits)
            tile = rows[0] * words_per_row(config) * slow
            tail = self._tail(beats, max(1.0, port.data_bits / word))
            return Writes(tile=tile, passing=_PASSING_ON, tail=tail)
        width = _BYTE * config.activation_bytes
        parts = max(1, FP16_BITS * line_places(config) // port.data_bits)
        together = max(1, min(port.data_bits // width, config.lanes))
        runs, line = 1.0, width
        if target is Target.CONTEXT:  # the last segment may have fewer rows
            runs = sum(ceil_div(count, self.rows) for count in rows) / len(rows)
        elif target is Target.KEYS:
            places = line_places(config)
            runs = ceil_div(self.position % places + self.rows, places)
            together, line = 1, FP16_BITS * cols
        lines = min(cols, elements)
        tile = max(_TILE + _RUN * runs, runs * ceil_div(lines, together) * parts)
        # Behind the last tile, which may be partial, nothing waits for its runs to be planned.
        rest = elements - (tiles - 1) * cols
        early = tile - max(1.0, runs * ceil_div(rest, together) * parts)
        in_order = elements if target in (Target.ACTIVATIONS, Target.WEIGHTS) else lines
        if target is Target.KEYS:
            in_order = lines * tiles * len(rows)
        beats = ceil_div(in_order * line, port.data_bits)
        period = 1.0
        if target is not Target.CONTEXT:
            period = max(1.0, tile * port.data_bits / (lines * line))
        tail = self._tail(beats, period)
        return Writes(_LEAD, tile, _PASSING - int(early), tail)

    def _tail(self, beats: int, period: float) -> int:
        """Cycles from the last beat of so many in order, one each `period` cycles, to its way to
        memory: those of a burst are sent when all are there, and behind the burst before."""
        full = self.config.data.burst_beats
        rest = beats % full or full
        return rest + (max(0, int(full - period * rest)) if beats > full else 0)

    def _quantize(self, d: Descriptor) -> VectorWork:
        """Blocks take the writer's place of tiles."""
        config, port = self.config, self.config.data
        tiles = ceil_div(d.k, config.engine.format.group)
        block = ceil_div(d.k, tiles)
        at_once = words_at_once(config)
        beats = _BYTE * config.activation_bytes * at_once / port.data_bits
        return VectorWork(
            *_waits(d),
            tiles=tiles,
            chunk=ceil_div(block, at_once),
            x=Operand(
                *(_REQUEST, beats, port.burst_beats, port.depth, 1.0),
                on_chip=self._on_chip(d.first),
            ),
            alone=True,
            writes=Writes(
                _QUANTIZED,
                ceil_div(block, self._quantized_at_once),
                on_chip=self._on_chip(d.results),
            ),
        )

    @property
    def _quantized_at_once(self) -> int:
        """Activations of a row that are quantised in a cycle."""
        return min(self.config.lanes, self.config.engine.format.group)

    def _writes_drafts(self, elements: int) -> Writes:
        """Results go through the quantiser, which holds a block of them."""
        config, port = self.config, self.config.data
        beat = max(1, DRAFT_LANES * port.data_bits // (_BYTE * config.activation_bytes))
        tail = self._tail(ceil_div(elements, beat), max(1.0, beat / config.lanes))
        last = (elements - 1) % config.engine.format.group + 1
        return Writes(passing=_DRAFTED + ceil_div(last, self._quantized_at_once), tail=tail)


def _waits(d: Descriptor) -> tuple[int | None, int | None]:
    """How many products and vector operations before it may be unfinished: of its own class none or
    all, of the other as many as `behind` says."""
    own, other = 0 if d.wait else None, d.behind - 1 if d.behind else None
    return (other, own) if d.kind is DescriptorKind.VECTOR else (own, other)


class PredictedPasses:
    """Cycles of the passes of a model on an accelerator, everything included; a
    `speq.model.pass_cycles.PassCycles`.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.
    model : ModelConfig
    formats : formats of the encoded linear layers by name
    latency : int
        Of the memory, in cycles.
    drafted_outputs : int, optional
        Outputs of the head that draft passes compute; all when not given.
    capacity : int, optional
        Entries of the KV cache; `default_capacity` when not given.
    weight_bits : float, optional
        Bits of weights that memory gives per cycle; as many as the port takes when not given.

    Raises
    ------
    ValueError
        If the model does not fit the accelerator, or that has no vector unit.
    """

    def __init__(
        self,
        config: AcceleratorConfig,
        model: ModelConfig,
        formats: Formats,
        latency: int,
        drafted_outputs: int | None = None,
        capacity: int | None = None,
        weight_bits: float | None = None,
    ) -> None:
        check_vector_unit(config)
        self._config, self._model, self._latency = config, model, latency
        self._machine = machine(config, latency, weight_bits)
        if capacity is None:
            capacity = default_capacity(config, model)
        self._layouts = {
            encoded: ModelLayout(
                *(config, model, list(formats) if encoded else [], capacity),
                drafted_outputs=drafted_outputs if encoded else None,
            )
            for encoded in (False, True)
        }
        self._cycles = lru_cache(maxsize=None)(self._counted)

    @property
    def rows(self) -> int:
        """Of the array."""
        return self._config.engine.rows

    def plain(self, context: int = 0) -> int:
        """Cycles of a pass of one token over plain FP16 weights."""
        return self._cycles(PassKind.VERIFY, 1, context, encoded=False)

    def draft(self, context: int = 0, reranked_tiles: int = 0) -> int:
        """Cycles of a draft pass that computes so many tiles of the head exactly."""
        return self._cycles(PassKind.DRAFT, 1, context, reranked_tiles)

    def verify(self, tokens: int, context: int = 0) -> int:
        """Cycles of a verify pass of so many rows."""
        return self._cycles(PassKind.VERIFY, tokens, context)

    def prefill(self, tokens: int, context: int = 0) -> int:
        """Cycles of a pass of so many rows that only fills the KV cache."""
        return self._cycles(PassKind.SINGLE, tokens, context)

    def _counted(
        self, kind: PassKind, rows: int, context: int, tiles: int = 0, encoded: bool = True
    ) -> int:
        program = self._program(kind, rows, context, tiles, encoded)
        if kind is PassKind.SINGLE:
            return walk_cycles(program, self._machine)
        return pass_cycles(program, self._machine, drafts=kind is PassKind.DRAFT)

    def _program(
        self, kind: PassKind, rows: int, context: int, tiles: int, encoded: bool
    ) -> list[Work]:
        # A product with a token takes a cycle for each of its bits: half of all have as many.
        token = self._model.vocab_size // 2
        in_text = kind is PassKind.SINGLE
        layout = self._layouts[encoded]
        works = WorkOf(
            *(self._config, rows, context, self._latency, tiles, token, in_text, layout.scratch)
        )
        return works.program(layout.program(kind, reranked=min(tiles, 1)))

    def walk(self, kind: PassKind | None, rows: int, context: int) -> int:
        """Cycles of a walk through the program of such a pass, and through one of END alone."""
        program = [] if kind is None else self._program(kind, rows, context, 0, encoded=True)
        return walk_cycles(program, self._machine)


def predicted_passes(
    model: ModelConfig,
    formats: Formats,
    *,
    rows: int = 8,
    cols: int = 16,
    lanes: int | None = None,
    latency: int = 16,
    context: int = 0,
    drafted_outputs: int | None = None,
    weight_bits: float | None = None,
    weights: AxiConfig | None = None,
    data: AxiConfig | None = None,
) -> PredictedPasses:
    """Cycles of passes on an accelerator that is made for a model and so many KV entries before a
    pass; parameters as of `PredictedPasses`, lanes 8 or the columns if there are fewer, ports as of
    `AcceleratorConfig`.

    Raises ValueError if none is made for it.
    """
    longest = max(model.hidden, model.ffn_hidden, model.heads * model.head_dim, context + rows)
    width = ceil_div(model.head_dim, cols) * cols
    first = next(iter(formats.values()), FormatConfig())
    engine = EngineConfig(rows=rows, cols=cols, format=first, max_k=longest)
    engine = replace(engine, max_o=max(engine.max_o, model.vocab_size, model.heads * width))
    lanes = min(8, cols) if lanes is None else lanes
    config = AcceleratorConfig(engine, weights, data, lanes=lanes)
    config = replace(config, query_heads=max(config.query_heads, model.heads))
    return PredictedPasses(
        *(config, model, formats, latency, drafted_outputs),
        capacity=context + rows,
        weight_bits=weight_bits,
    )
