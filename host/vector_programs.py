# SPDX-License-Identifier: Apache-2.0
"""Programs of an accelerator with a vector unit, from the schedule of a pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from speq.host.vector_layout import GELU_LINEAR, HEAD_MASK, ONES, VectorPlaces
from speq.hw.accelerator_config import PassKind
from speq.hw.control.descriptor import (
    DESCRIPTOR_BYTES,
    Descriptor,
    DescriptorKind,
    Target,
    VectorOperation,
)
from speq.hw.engine_config import Mode
from speq.model.schedule import Attention, Linears, Operation, Step, Vector
from speq.model.vector_ops import GELU_CUBIC


def vector_program(layout: VectorPlaces, kind: PassKind) -> list[tuple[Descriptor, str]]:
    """The program of a pass, but for RERANK and END, with the names of its products; "" for other
    descriptors."""
    return _Program(layout, kind).descriptors


def moves(layout: VectorPlaces) -> list[Descriptor]:
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


def _queries_first(schedule: Iterable[Step]) -> list[Step]:
    """The steps of a schedule, in each block those of the queries before those of keys and values,
    of which they are independent."""
    steps = list(schedule)
    for start, step in enumerate(steps):
        if isinstance(step, Linears) and step.targets[0] == "q":
            others = (i for i in range(start + 1, len(steps)) if not isinstance(steps[i], Vector))
            end = next(others, len(steps))
            part = steps[start + 1 : end]
            steps[start + 1 : end] = sorted(part, key=lambda each: not _is_of_queries(each))
    return steps


def _is_of_queries(step: Step | None) -> bool:
    """Whether a step is vector work on the queries."""
    return isinstance(step, Vector) and step.target == "q"


class _Program:
    """The steps of a schedule as descriptors.

    A vector operation waits for what gives it an operand, and a product for vector operations. But
    in attention the array goes on to the next head while the vector unit works on one, and while
    that works on the queries, the array multiplies for keys and values.
    """

    def __init__(self, layout: VectorPlaces, kind: PassKind) -> None:
        self._layout, self._model, self._kind = layout, layout.model, kind
        self.descriptors: list[tuple[Descriptor, str]] = []
        #: Results since the last descriptor that waits for all before it.
        self._unfinished: set[int] = set()
        #: FP32 tiles by the names of the schedule's buffers. x are FP16 activations.
        self._buffers = {"h": layout.stream}
        #: Whether x are draft activations already.
        self._x_is_quantized = False
        #: The linear layers that take the next x.
        self._takers: tuple[str, ...] = ()
        #: Products that may begin as soon as the next vector operation has.
        self._late: list[tuple[Descriptor, str]] = []
        steps = _queries_first(layout.schedule(kind))
        for i, (step, following) in enumerate(zip_longest(steps, steps[1:])):
            later = (each.names for each in steps[i + 1 :] if isinstance(each, Linears))
            self._takers = next(later, ())
            match step:
                case Linears():
                    self._linears(step, following)
                case Attention(block):
                    self._attention(block)
                case Vector(Operation.ROUND, target="x"):
                    pass  # what becomes x is FP16 already
                case Vector(Operation.STORE | Operation.SELECT):
                    pass  # keys and values are stored as soon as they are FP16
                case Vector():
                    self._step(step)

    # Descriptors.

    def _product(self, descriptor: Descriptor, name: str, wait: bool | None = None) -> None:
        if wait is None:
            wait = self._follows(DescriptorKind.VECTOR)
        if wait:
            self._unfinished.clear()
        self._unfinished.add(descriptor.results)
        self.descriptors.append((replace(descriptor, wait=wait), name))

    def _vector(
        self,
        operation: VectorOperation,
        target: Target,
        first: int,
        results: int,
        *,
        factor: float = 0.0,
        wait: bool | None = None,
        **fields: Any,
    ) -> None:
        if wait is None:
            operands = {first, fields.get("second")}
            wait = not operands.isdisjoint(self._unfinished)
            if wait:
                self._unfinished.clear()
        self._unfinished.add(results)
        descriptor = Descriptor(
            DescriptorKind.VECTOR,
            operation=operation,
            target=target,
            wait=wait,
            first=first,
            results=results,
            argument=float_bits(factor),
            **fields,
        )
        self.descriptors.append((descriptor, ""))
        for late in self._late:
            self._product(*late, wait=False)
        self._late.clear()

    def _follows(self, kind: DescriptorKind) -> bool:
        """Whether the last descriptor is of this kind."""
        return bool(self.descriptors) and self.descriptors[-1][0].kind is kind

    # Steps of the schedule.

    def _linears(self, step: Linears, following: Step | None) -> None:
        layout = self._layout
        weights = [layout.weights[name] for name in step.names]
        drafts = any(each.mode(self._kind) is Mode.DRAFT for each in weights)
        if drafts and not self._x_is_quantized:
            self._vector(
                VectorOperation.QUANTIZE,
                Target.TILES,
                layout.activations,
                layout.draft_activations,
                wait=True,
                k=weights[0].k,
                o=1,
            )
        self._x_is_quantized = False
        products = layout.products(self._kind, step)
        if _is_of_queries(following):
            products, self._late = products[:1], products[1:]
        for product in products:
            self._product(*product)
        results = layout.results_of(step.names)
        self._buffers.update(zip(step.targets, results, strict=True))

    def _attention(self, block: int) -> None:
        layout, model = self._layout, self._model
        scores, values = (layout.products(self._kind, s) for s in Attention(block, "", "").stages)
        window = 0 if model.is_global(block) else model.sliding_window or 0
        for head, product in enumerate(scores):
            self._product(*product, wait=head == 0)
            self._vector(
                VectorOperation.SOFTMAX,
                Target.WEIGHTS,
                product[0].results,
                layout.softmax_weights + head * layout.attention_stride(layout.capacity),
                factor=model.attention_scale,
                wait=True,
                o=head * layout.sharing,
                sharing=layout.sharing,
                detail=window,
            )
        head_bytes = model.head_dim * layout.config.activation_bytes
        for head, product in enumerate(values):
            self._product(*product, wait=head == 0)
            self._vector(
                VectorOperation.NORMALIZE,
                Target.CONTEXT,
                product[0].results,
                layout.activations + head * layout.sharing * head_bytes,
                wait=True,
                o=head * layout.sharing,
                sharing=layout.sharing,
                k=model.head_dim,
                outer=head_bytes,
            )

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
                self._gate(step)
            case Operation.ADD:
                stream, y = (self._buffers[name] for name in step.sources)
                self._vector(
                    VectorOperation.ADD,
                    Target.TILES,
                    y,
                    stream,
                    factor=step.factor,
                    second=stream,
                    **self._shape(step.target),
                )
            case _:
                raise ValueError(f"{step.operation} has no descriptor")

    def _place_of_x(self) -> tuple[Target, int]:
        """Where the next x goes: to draft activations at once if no product needs FP16 ones, as
        those of a head that is computed anew do."""
        layout = self._layout
        modes = {layout.weights[name].mode(self._kind) for name in self._takers}
        if modes == {Mode.DRAFT} and self._takers != ("head",):
            self._x_is_quantized = True
            return Target.DRAFT_ACTIVATIONS, layout.draft_activations
        return Target.ACTIVATIONS, layout.activations

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

    def _gate(self, step: Vector) -> None:
        layout, shape = self._layout, self._shape("gate")
        gate, up = (self._buffers[name] for name in step.sources)
        operation, first, second = VectorOperation.GATE, gate, up
        if self._model.activation == "gelu_tanh":
            operation, first, second = VectorOperation.SIGMOID_GATE, up, layout.temporary
            self._multiply(gate, gate, second, GELU_CUBIC, **shape)
            self._vector(
                VectorOperation.ADD,
                Target.TILES,
                second,
                second,
                factor=1.0,
                values=True,
                second=layout.channels[GELU_LINEAR],
                **shape,
            )
            self._multiply(second, gate, second, **shape)
            self._multiply(gate, up, first, **shape)
        target, results = self._place_of_x()
        self._vector(operation, target, first, results, second=second, **shape)

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


class VectorLayout(VectorPlaces):
    """A layout whose programs do all vector work."""

    def host_turns(self, kind: PassKind) -> int:
        return 0

    def _named_program(self, kind: PassKind, reranked: int) -> list[tuple[Descriptor, str]]:
        if kind is PassKind.MOVE:
            return self._ended([(descriptor, "") for descriptor in moves(self)], kind, 0)
        return self._ended(vector_program(self, kind), kind, reranked)

    def _program_size(self, kind: PassKind) -> int:
        reranks = kind is PassKind.DRAFT
        return DESCRIPTOR_BYTES * (len(self._named_program(kind, reranked=0)) + reranks)
