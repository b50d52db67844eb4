# SPDX-License-Identifier: Apache-2.0
"""Programs of an accelerator with a vector unit, from the schedule of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np

from speq.host.layout import ceil_div
from speq.host.places import GELU_LINEAR, HEAD_MASK, ONES, ModelPlaces
from speq.hw.accelerator_config import PassKind
from speq.hw.control.descriptor import (
    DESCRIPTOR_BYTES,
    Descriptor,
    DescriptorKind,
    Target,
    VectorOperation,
)
from speq.hw.engine_config import DRAFT_LANES, Mode
from speq.hw.vector.lane import PACES, LaneOperation
from speq.model.schedule import Attention, Linears, Operation, Step, Vector
from speq.model.vector_ops import GELU_CUBIC

_SINGLE = 4  # bytes of an FP32 number
#: The largest `behind`.
_MOST_BEHIND = 3
#: Cycles of a vector operation in which no word is taken, about.
_VECTOR_LATENCY = 160
#: Other vector operations of a gate with GELU.
_GELU_OPERATIONS = 4
_GELU_WORD_CYCLES = 3 * PACES[LaneOperation.SCALE_TWICE] + PACES[LaneOperation.ADD_SCALED]
_MOST_PIECES = 3
#: Tiles that may be before a piece.
_MOST_TILES = 255


def pass_program(layout: ModelPlaces, kind: PassKind) -> list[tuple[Descriptor, str]]:
    """The program of a pass, but for RERANK and END, with the names of its products; "" for other
    descriptors."""
    return _Program(layout, kind).descriptors


def moves(layout: ModelPlaces) -> list[Descriptor]:
    """What moves an entry of the KV cache, block by block."""
    return [
        Descriptor(
            DescriptorKind.VECTOR,
            operation=VectorOperation.MOVE,
            target=Target.TILES,
            k=layout.model.head_dim,
            o=layout.model.kv_heads,
            first=layout.keys_address(block, 0),
            second=layout.values_address(block, 0),
            inner=layout.key_stride,
            outer=layout.value_stride,
        )
        for block in range(layout.model.blocks)
    ]


def float_bits(value: float) -> int:
    """The FP32 number that is nearest to a value, as bits."""
    return int(np.float32(value).view(np.uint32))


class _Program:
    """The steps of a schedule as descriptors.

    Each waits for what gives it an operand, and for nothing else: descriptors are in an order in
    which the array has other products to go on with, where there are some, while the vector unit
    works. Where the results of a product are the vector unit's next, the product is in pieces, so
    that only what is done with the last tiles is left when it ends.
    """

    def __init__(self, layout: ModelPlaces, kind: PassKind) -> None:
        self._layout, self._model, self._kind = layout, layout.model, kind
        self.descriptors: list[tuple[Descriptor, str]] = []
        #: Numbers, among those of their class, of the descriptors that have written a buffer.
        self._writers: dict[int, list[tuple[bool, int]]] = {}
        #: Descriptors of each class, by whether they are vector operations, and how many of them,
        #: from the first one on, are finished when the next descriptor starts.
        self._count, self._finished = [0, 0], [0, 0]
        #: FP32 tiles by the names of the schedule's buffers. x are FP16 activations.
        self._buffers = {"h": layout.stream}
        #: Whether x are draft activations already.
        self._x_is_quantized = False
        #: The linear layers that take the next x.
        self._takers: tuple[str, ...] = ()
        steps = [step for step in layout.schedule(kind) if not self._is_implied(step)]
        while steps:
            step = steps.pop(0)
            later = (each.names for each in steps if isinstance(each, Linears))
            self._takers = next(later, ())
            match step, steps[0] if steps else None:
                case Linears(targets=("q", _, _)), _:
                    of_heads = list(takewhile(lambda each: isinstance(each, Vector), steps))
                    steps = steps[len(of_heads) :]
                    match steps:
                        case [Attention(block), *steps]:
                            self._attention(step, of_heads, block)
                        case _:
                            self._attention(step, of_heads, None)
                case Linears(targets=("gate", "up")), Vector(Operation.GATE) as gate:
                    self._gated(step, gate)
                    del steps[0]
                case Linears(targets=("y",)), Vector(Operation.ADD) as add:
                    self._added(step, add)
                    del steps[0]
                case Linears(), _:
                    self._linears(step)
                case Vector(), _:
                    self._step(step)

    @staticmethod
    def _is_implied(step: Step) -> bool:
        """Whether a step needs no descriptor: what becomes x is FP16 already, and keys and values
        are stored as soon as they are."""
        return isinstance(step, Vector) and (
            step.operation in (Operation.STORE, Operation.SELECT)
            or (step.operation is Operation.ROUND and step.target == "x")
        )

    # Descriptors.

    def _emit(
        self, descriptor: Descriptor, name: str, reads: Iterable[int], writes: int, goes_on: bool
    ) -> None:
        """Add a descriptor that reads and writes these buffers. If it goes on, what has been
        written there before is still of use."""
        mine = descriptor.kind is DescriptorKind.VECTOR
        needs = [writer for buffer in reads for writer in self._writers.get(buffer, ())]
        left = [(own, i) for own, i in needs if i >= self._finished[own]]
        wait, behind = any(own is mine for own, _ in left), 0
        if wait:
            self._finished[mine] = self._count[mine]
        if others := [i for own, i in left if own is not mine]:
            behind = min(_MOST_BEHIND, self._count[not mine] - max(others))
            self._finished[not mine] = self._count[not mine] - (behind - 1)
        self.descriptors.append((replace(descriptor, wait=wait, behind=behind), name))
        if not goes_on:
            self._writers[writes] = []
        self._writers.setdefault(writes, []).append((mine, self._count[mine]))
        self._count[mine] += 1

    def _product(
        self,
        descriptor: Descriptor,
        name: str,
        reads: Iterable[int] = (),
        writes: int | None = None,
        goes_on: bool = False,
    ) -> None:
        """`reads` besides its activations; it writes the buffer at its results, or another."""
        reads = (descriptor.activations, *reads)
        self._emit(
            descriptor, name, reads, descriptor.results if writes is None else writes, goes_on
        )

    def _vector(
        self,
        operation: VectorOperation,
        target: Target,
        first: int,
        results: int,
        *,
        factor: float = 0.0,
        reads: Iterable[int] | None = None,
        writes: int | None = None,
        goes_on: bool = False,
        **fields: Any,
    ) -> None:
        """It reads the buffers at its operands, or others, and writes that at its results, or
        another."""
        descriptor = Descriptor(
            DescriptorKind.VECTOR,
            operation=operation,
            target=target,
            first=first,
            results=results,
            argument=float_bits(factor),
            **fields,
        )
        if reads is None:
            reads = (first, fields.get("second", 0))
        self._emit(descriptor, "", reads, results if writes is None else writes, goes_on)

    def _piece(self, descriptor: Descriptor, tiles: range) -> Descriptor:
        """A GEMM's part with these tiles of outputs; the others' results are left out."""
        layout, cols = self._layout, self._layout.config.engine.cols
        sizes = layout.tile_bytes(descriptor.mode, descriptor.k)
        places = {
            name: getattr(descriptor, name) + tiles.start * size for name, size in sizes.items()
        }
        o = min(descriptor.o, tiles.stop * cols) - tiles.start * cols
        return replace(descriptor, o=o, tile=tiles.start, **places)

    def _pieces(
        self,
        products: list[tuple[Descriptor, str]],
        *,
        operations: int = 1,
        word_cycles: int = 1,
        multiple: int = 1,
    ) -> list[range]:
        """The tiles of products of one shape in pieces, the last one as short as can be: while the
        next piece is multiplied, the vector unit carries out its operations on a piece, which take
        so many cycles for a word in all. All but the last are a multiple of so many tiles."""
        config, (descriptor, _) = self._layout.config, products[0]
        rows = 1 if self._kind is PassKind.DRAFT else config.engine.rows
        steps = ceil_div(descriptor.k, DRAFT_LANES if descriptor.mode is Mode.DRAFT else 1)
        work = word_cycles * rows * config.engine.cols // config.lanes
        cycles = len(products) * max(steps, rows)
        tiles = ceil_div(descriptor.o, config.engine.cols)
        for last in range(1, tiles // 2 + 1):
            sizes, left = [last], tiles - last
            while left and len(sizes) < _MOST_PIECES:
                fit = (sizes[0] * cycles - operations * _VECTOR_LATENCY) // work
                size = min(left, fit) // multiple * multiple
                if size <= 0:
                    break
                sizes.insert(0, size)
                left -= size
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            if not left and starts[-1] <= _MOST_TILES:
                return [range(i, i + size) for i, size in zip(starts, sizes, strict=True)]
        return [range(tiles)]

    def _in_pieces(
        self,
        products: list[tuple[Descriptor, str]],
        pieces: list[range],
        follow: Callable[[range, int], None],
    ) -> None:
        """Multiply piece by piece, and let vector work on each follow behind the product with the
        next one. Piece i of a product writes a buffer of its own, i behind the product's address.
        """
        for i, piece in enumerate(pieces):
            for descriptor, name in products:
                self._product(self._piece(descriptor, piece), name, writes=descriptor.results + i)
            if i > 0:
                follow(pieces[i - 1], i - 1)
        follow(pieces[-1], len(pieces) - 1)

    # Steps of the schedule.

    def _quantize(self, names: Sequence[str]) -> None:
        """Draft activations for linear layers, if one of them is in mode DRAFT."""
        weights = [self._layout.weights[name] for name in names]
        drafts = any(each.mode(self._kind) is Mode.DRAFT for each in weights)
        if drafts and not self._x_is_quantized:
            self._vector(
                VectorOperation.QUANTIZE,
                Target.TILES,
                self._layout.inputs_of(names[0], Mode.VERIFY),
                self._layout.inputs_of(names[0], Mode.DRAFT),
                k=weights[0].k,
                o=1,
            )

    def _place_of_x(self) -> tuple[Target, int]:
        """Where the next x goes: to draft activations at once if no product needs FP16 ones, as
        those of a head that is computed anew do."""
        layout = self._layout
        modes = {layout.weights[name].mode(self._kind) for name in self._takers}
        self._x_is_quantized = modes == {Mode.DRAFT} and self._takers != ("head",)
        if self._x_is_quantized:
            return Target.DRAFT_ACTIVATIONS, layout.inputs_of(self._takers[0], Mode.DRAFT)
        return Target.ACTIVATIONS, layout.inputs_of(self._takers[0], Mode.VERIFY)

    def _begin(self, step: Linears) -> list[tuple[Descriptor, str]]:
        """A stage's products, whose activations are on their way."""
        self._quantize(step.names)
        self._x_is_quantized = False
        results = self._layout.results_of(step.names)
        self._buffers.update(zip(step.targets, results, strict=True))
        return self._layout.products(self._kind, step)

    def _linears(self, step: Linears) -> None:
        for product in self._begin(step):
            self._product(*product)

    def _attention(self, step: Linears, of_heads: list[Step], block: int | None) -> None:
        """From the projections of queries, keys and values to what attention gives, or without a
        block to the keys and values alone.

        While the array multiplies for values, the vector unit works on queries and keys, and from
        then on each for another KV head than the other.
        """
        layout, model = self._layout, self._model
        q, k, v = self._begin(step)

        def finish(name: str) -> None:
            for each in of_heads:
                if isinstance(each, Vector) and each.target == name:
                    self._step(each)

        self._product(*q)
        self._product(*k)
        finish("q")
        self._product(*v)
        finish("k")
        if block is None:
            finish("v")
            return
        scores, values = (layout.products(self._kind, s) for s in Attention(block, "", "").stages)
        window = 0 if model.is_global(block) else model.sliding_window or 0

        def weigh(head: int) -> None:
            self._vector(
                VectorOperation.SOFTMAX,
                Target.WEIGHTS,
                scores[head][0].results,
                values[head][0].activations,
                factor=model.attention_scale,
                o=head * layout.sharing,
                sharing=layout.sharing,
                detail=window,
            )

        last = model.kv_heads - 1
        for head, product in enumerate(scores):
            self._product(*product, reads=(layout.queries, layout.keys_address(block, 0)))
            if head == 0:
                finish("v")
            else:
                weigh(head - 1)
        if last == 0:
            weigh(last)
        for head, product in enumerate(values):
            self._product(*product, reads=(layout.values_address(block, 0),))
            if head > 0:
                self._normalize(values, head - 1)
            elif last > 0:
                weigh(last)
        self._normalize(values, last)

    def _normalize(self, values: list[tuple[Descriptor, str]], head: int) -> None:
        """The outputs of a KV head's attention."""
        layout, model = self._layout, self._model
        head_bytes = model.head_dim * layout.config.activation_bytes
        self._vector(
            VectorOperation.NORMALIZE,
            Target.CONTEXT,
            values[head][0].results,
            layout.activations + head * layout.sharing * head_bytes,
            writes=layout.activations,
            goes_on=head > 0,
            o=head * layout.sharing,
            sharing=layout.sharing,
            k=model.head_dim,
            outer=head_bytes,
        )

    def _gated(self, step: Linears, gate: Vector) -> None:
        """The projections whose product the gate is, and the gate, piece by piece."""
        layout, cols = self._layout, self._layout.config.engine.cols
        products = self._begin(step)
        others, word_cycles = 0, PACES[LaneOperation.GATE]
        if self._model.activation == "gelu_tanh":
            others, word_cycles = _GELU_OPERATIONS, word_cycles + _GELU_WORD_CYCLES
        # A piece's draft activations are whole blocks and begin with a beat.
        in_beat = DRAFT_LANES * layout.config.data.beat_bytes // layout.config.activation_bytes
        whole = max(layout.config.engine.format.group, in_beat)
        multiple = max(1, whole // cols) if self._kind is PassKind.DRAFT else 1
        pieces = self._pieces(
            products,
            operations=1 + others,
            word_cycles=word_cycles,
            multiple=multiple,
        )
        self._in_pieces(products, pieces, lambda piece, i: self._gate(gate, piece, i))

    def _added(self, step: Linears, add: Vector) -> None:
        """A layer whose outputs are added to the residual stream, piece by piece."""
        products, cols = self._begin(step), self._layout.config.engine.cols

        def follow(piece: range, i: int) -> None:
            k = min(self._model.hidden, piece.stop * cols) - piece.start * cols
            reads = (products[0][0].results + i,)
            self._add(add, o=1, k=k, tile=piece.start, reads=reads, goes_on=i > 0)

        self._in_pieces(products, self._pieces(products), follow)

    def _step(self, step: Vector) -> None:
        match step.operation:
            case Operation.EMBED:
                self._embed(step)
            case Operation.NORM | Operation.HEAD_NORM:
                self._norm(step)
            case Operation.ADD_BIAS:
                self._add_bias(step)
            case Operation.ROTATE:
                self._attention_operand(step, rotated=True)
            case Operation.ROUND:
                self._attention_operand(step, rotated=False)
            case Operation.GATE:
                size = self._shape("gate")["k"]
                self._gate(step, range(ceil_div(size, self._layout.config.engine.cols)), 0)
            case Operation.ADD:
                self._add(step, **self._shape(step.target))
            case _:
                raise ValueError(f"{step.operation} has no descriptor")

    def _add(self, step: Vector, **fields: Any) -> None:
        stream, y = (self._buffers[name] for name in step.sources)
        self._vector(
            VectorOperation.ADD,
            Target.TILES,
            y,
            stream,
            factor=step.factor,
            second=stream,
            **fields,
        )

    def _shape(self, buffer: str) -> dict[str, Any]:
        """Segments and elements of a buffer."""
        model = self._model
        heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads}
        if buffer in heads:
            return {"o": heads[buffer], "k": model.head_dim}
        return {"o": 1, "k": model.ffn_hidden if buffer in ("gate", "up") else model.hidden}

    def _embed(self, step: Vector) -> None:
        layout = self._layout
        in_text = self._kind is PassKind.SINGLE
        self._vector(
            VectorOperation.EMBED,
            Target.TILES,
            layout.embedding,
            self._buffers[step.target],
            factor=step.factor,
            values=in_text,
            second=layout.text if in_text else 0,
            detail=layout.embedding_pitch,
            **self._shape(step.target),
        )

    def _norm(self, step: Vector) -> None:
        layout, shape = self._layout, self._shape(step.sources[0])
        source = self._buffers[step.sources[0]]
        if step.operation is Operation.HEAD_NORM and HEAD_MASK in layout.channels:
            self._clear_padding(step.sources[0], step.weight.replace("_norm", "_proj"))
        target, results = Target.TILES, source
        if step.target == "x":
            target, results = self._place_of_x()
        scaled = step.factor != 1.0
        self._vector(
            VectorOperation.NORM,
            Target.TILES if scaled else target,
            source,
            layout.temporary if scaled else results,
            factor=1.0 / shape["k"],
            values=True,
            second=layout.channels[step.weight],
            detail=float_bits(self._model.norm_eps),
            **shape,
        )
        if scaled:
            self._multiply(
                layout.temporary, layout.channels[ONES], results, step.factor, target, True, **shape
            )

    def _clear_padding(self, buffer: str, layer: str) -> None:
        """Draft weights are never 0, so outputs that are padding are not 0 in draft mode, as a norm
        demands."""
        if self._layout.weights[layer].mode(self._kind) is Mode.DRAFT:
            tiles, mask = self._buffers[buffer], self._layout.channels[HEAD_MASK]
            self._multiply(tiles, mask, tiles, values=True, **self._shape(buffer))

    def _add_bias(self, step: Vector) -> None:
        buffer = self._buffers[step.target]
        self._vector(
            VectorOperation.ADD,
            Target.TILES,
            buffer,
            buffer,
            factor=1.0,
            values=True,
            second=self._layout.channels[step.weight],
            **self._shape(step.target),
        )

    def _attention_operand(self, step: Vector, *, rotated: bool) -> None:
        layout, name = self._layout, step.target
        fields: dict[str, Any] = {}
        match name:
            case "q":
                target, results = Target.QUERIES, layout.queries
                outer = layout.attention_stride(self._model.head_dim)
                inner = layout.batch_bytes(self._model.head_dim)
                fields["sharing"] = layout.sharing
            case "k":
                target, results = Target.KEYS, layout.keys_address(step.block, 0)
                inner = layout.key_stride
                outer = inner // self._model.kv_heads
            case _:
                target, results = Target.VALUES, layout.values_address(step.block, 0)
                inner = layout.value_stride
                outer = inner * layout.value_tiles
        if rotated:
            is_global = self._model.is_global(step.block) or len(layout.rotary) == 1
            fields["second"] = layout.rotary["global" if is_global else "local"]
            fields["detail"] = layout.rotary_pitch
        self._vector(
            VectorOperation.ROTATE if rotated else VectorOperation.ROUND,
            target,
            self._buffers[name],
            results,
            outer=outer,
            inner=inner,
            **fields,
            **self._shape(name),
        )

    def _gate(self, step: Vector, tiles: range, number: int) -> None:
        """The gate of these tiles, which are piece `number`."""
        layout, cols = self._layout, self._layout.config.engine.cols
        gate, up = (self._buffers[name] for name in step.sources)
        start = tiles.start * cols
        shape: dict[str, Any] = {
            "o": 1,
            "k": min(self._model.ffn_hidden, tiles.stop * cols) - start,
        }
        shape |= {"tile": tiles.start}
        operands = (gate + number, up + number)
        operation, first, second = VectorOperation.GATE, gate, up
        if self._model.activation == "gelu_tanh":
            operation, first, second = VectorOperation.SIGMOID_GATE, up, layout.temporary
            self._multiply(gate, gate, second, GELU_CUBIC, reads=operands, **shape)
            self._vector(
                VectorOperation.ADD,
                Target.TILES,
                second,
                second,
                factor=1.0,
                values=True,
                second=layout.channels[GELU_LINEAR] + _SINGLE * start,
                **shape,
            )
            self._multiply(second, gate, second, **shape)
            self._multiply(gate, up, first, reads=operands, **shape)
            operands = (first, second)
        target, results = self._place_of_x()
        words = start // DRAFT_LANES if target is Target.DRAFT_ACTIVATIONS else start
        self._vector(
            operation,
            target,
            first,
            results + words * layout.config.activation_bytes,
            writes=results,
            goes_on=number > 0,
            reads=operands,
            second=second,
            **shape,
        )

    def _multiply(
        self,
        first: int,
        second: int,
        results: int,
        factor: float = 1.0,
        target: Target = Target.TILES,
        values: bool = False,
        **shape: Any,
    ) -> None:
        self._vector(
            VectorOperation.MULTIPLY,
            target,
            first,
            results,
            factor=factor,
            values=values,
            second=second,
            **shape,
        )


class ModelLayout(ModelPlaces):
    """A layout whose programs do all vector work."""

    def _named_program(self, kind: PassKind, reranked: int) -> list[tuple[Descriptor, str]]:
        if kind is PassKind.MOVE:
            return self._ended([(descriptor, "") for descriptor in moves(self)], kind, 0)
        return self._ended(pass_program(self, kind), kind, reranked)

    def _program_size(self, kind: PassKind) -> int:
        reranks = kind is PassKind.DRAFT
        return DESCRIPTOR_BYTES * (len(self._named_program(kind, reranked=0)) + reranks)
