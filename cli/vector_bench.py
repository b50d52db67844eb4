# SPDX-License-Identifier: Apache-2.0
"""Vector operations of whole passes on the simulated accelerator: rates, latencies, shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from speq.host.layout import Kind, MemoryLayout
from speq.host.program_meter import ProgramMeter
from speq.host.session import Session, accelerator_for
from speq.hw.accelerator_config import PassKind
from speq.hw.control.descriptor import Descriptor, DescriptorKind, Target, VectorOperation
from speq.model.checkpoint import Model, ModelConfig, tensor_shapes
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.tokenizer import Tokenizer
from speq.sim.session import board_for

#: KV entries before the passes.
POSITION = 96
_ON_ATTENTION = (VectorOperation.SOFTMAX, VectorOperation.NORMALIZE)


@dataclass(frozen=True)
class Shape:
    """A model on an accelerator of so many rows, columns and lanes."""

    name: str
    model: Model
    rows: int
    cols: int
    lanes: int = 8

    @property
    def note(self) -> str:
        """What is measured."""
        return f"{self.name}, {self.rows} x {self.cols}, {self.lanes} lanes"


@dataclass
class OperationCycles:
    """What the descriptors of an operation with a target take in a pass.

    Attributes
    ----------
    descriptor : Descriptor
        The longest of them.
    elements : int
        Of results, of that one.
    alone, repeated : int
        Its cycles by itself, to the last result in memory, and between others like it.
    adds : int
        Cycles that all of them add to the pass.
    """

    descriptor: Descriptor
    elements: int
    alone: int = 0
    repeated: int = 0
    adds: int = 0


@dataclass
class PassCycles:
    """A pass: its cycles, those of its blocks, without embedding, last norm and head, and those of
    its vector operations by operation and target; what its counters count."""

    cycles: int
    blocks: int
    operations: dict[tuple[VectorOperation, Target], OperationCycles] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)


def random_model(config: ModelConfig, seed: int, tokenizer: Tokenizer) -> Model:
    """Weights with the spread of a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator).mul_(0.05).half()
        for name, shape in tensor_shapes(config)
    }
    return Model(f"random {config.architecture}", config, weights, tokenizer)


def shapes(seed: int) -> Iterator[Shape]:
    """What is measured: SmolLM2-135M's dimensions, and a small model with the other vector work:
    norms of heads and behind layers, and gates of GELU. One simulation serves both."""
    tokenizer = load_model("tiny").tokenizer
    smollm2 = ModelConfig(
        *("llama", 512, 576, 1536, 1, 9, 3, 64, 8192),
        norm_eps=1e-5,
        rope_base=100_000.0,
        attention_scale=64**-0.5,
        tied_head=False,
    )
    yield Shape("a block of SmolLM2-135M's shapes", random_model(smollm2, seed, tokenizer), 8, 32)
    gemma3 = ModelConfig(
        *("gemma3", 512, 128, 400, 1, 4, 1, 32, 8192),
        norm_eps=1e-6,
        rope_base=1e6,
        attention_scale=32**-0.5,
        tied_head=False,
        activation="gelu_tanh",
        head_norms=True,
        post_norms=True,
        sliding_window=64,
        local_rope_base=1e4,
        windowed=(0,),
    )
    yield Shape("norms of heads, GELU", random_model(gemma3, seed, tokenizer), 8, 32)


def measure(shape: Shape) -> dict[PassKind, PassCycles]:
    """A draft pass and a verify pass of as many rows as the array has, behind `POSITION` entries,
    descriptor by descriptor."""
    model, capacity = shape.model, POSITION + shape.rows
    encoded = encode_linears(model)
    config = accelerator_for(model, encoded, shape.rows, shape.cols, capacity, shape.lanes)
    board = board_for(model, encoded, config, capacity=capacity)
    with Session(model, encoded, board, capacity=capacity) as session:
        layout = session.driver.layout
        for part in layout.parts:
            if part.kind in (Kind.KEYS, Kind.VALUES, Kind.TEXT):
                board.write(part.start, np.zeros(part.size, np.uint8))
        meter = ProgramMeter(board, layout)
        kinds = {PassKind.DRAFT: 1, PassKind.VERIFY: shape.rows}
        return {kind: _measure(meter, layout, kind, rows) for kind, rows in kinds.items()}


def _measure(meter: ProgramMeter, layout: MemoryLayout, kind: PassKind, rows: int) -> PassCycles:
    *program, _ = layout.program(kind)
    ends = meter.prefixes(program, rows, POSITION)
    vectors = [i for i, d in enumerate(program) if d.kind is DescriptorKind.VECTOR]
    # Behind the last block is the head, with the vector work before it: what adds to the residual
    # stream is the blocks' last.
    last = max(i for i in vectors if program[i].operation is VectorOperation.ADD)
    result = PassCycles(ends[-1] - meter.cycles([], rows, POSITION), ends[last + 1] - ends[1])
    result.counters = meter.counters(program, rows, POSITION)
    for i in vectors:
        descriptor = program[i]
        key = VectorOperation(descriptor.operation), Target(descriptor.target)
        elements = _elements(descriptor, rows)
        found = result.operations.setdefault(key, OperationCycles(descriptor, elements))
        if 1 <= i <= last:
            found.adds += ends[i + 1] - ends[i]
        if elements > found.elements:
            found.descriptor, found.elements = descriptor, elements
    for found in result.operations.values():
        found.alone = meter.alone(found.descriptor, rows, POSITION)
        found.repeated = meter.repeated(found.descriptor, rows, POSITION)
    return result


def _elements(descriptor: Descriptor, rows: int) -> int:
    """Elements of results of a VECTOR in a pass of so many rows."""
    if descriptor.operation is VectorOperation.SOFTMAX:
        return rows * descriptor.sharing * (POSITION + rows)
    if descriptor.operation is VectorOperation.NORMALIZE:
        return rows * descriptor.sharing * descriptor.k
    return rows * descriptor.o * descriptor.k
