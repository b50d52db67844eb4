# SPDX-License-Identifier: Apache-2.0
"""The schedule of a pass: which products and which vector steps, in which order, on which buffers.

It is written once, here. The golden forward pass carries it out (`speq.model.transformer`), the
accelerator's programs and memory layout are made from it (`speq.host.layout`), and from these the
cycle model's works (`speq.host.cycles`).

A schedule is a list of steps. `Linears` and `Attention` are for the array, `Vector` steps are what
lies between. Buffers have names:

    h                   the residual stream, FP32 [T, H]
    x                   what enters the array next, FP16
    q, k, v             queries, keys and values: FP32 [T, heads * D], FP16 once they are rotated
    y, gate, up         products of other linear layers, FP32
    logits              FP32 [rows, V]

The products of a `Linears` step depend on nothing but one input, so they form a *stage*: the array
multiplies without a break. Attention has two stages, because the softmax lies between its products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from speq.model.checkpoint import LINEARS, ModelConfig, tensor_shapes


class Operation(Enum):
    """What a `Vector` step does."""

    #: Rows of the embedding, times the factor.
    EMBED = auto()
    #: RMSNorm of the whole row, times the factor.
    NORM = auto()
    #: RMSNorm of each head, with one weight [D] for all.
    HEAD_NORM = auto()
    #: FP32 to FP16.
    ROUND = auto()
    #: Adds a bias to each row.
    ADD_BIAS = auto()
    #: Rotary embedding of all heads, with the block's tables; FP32 in, FP16 out.
    ROTATE = auto()
    #: Writes keys and values to the KV cache.
    STORE = auto()
    #: activation(gate) * up; FP32 in, FP16 out.
    GATE = auto()
    #: The first buffer plus the factor times the second.
    ADD = auto()
    #: Keeps only the rows whose logits are wanted.
    SELECT = auto()


@dataclass(frozen=True)
class Vector:
    """A step outside the array: `target` = operation(sources), with the model's `weight` ("" where
    the operation has none) and an FP32 `factor`, in a `block` where that matters (else -1)."""

    operation: Operation
    sources: tuple[str, ...]
    target: str
    weight: str = ""
    block: int = -1
    factor: float = 1.0


@dataclass(frozen=True)
class Linears:
    """Linear layers of one input, without their biases: a stage. targets[i] = `source` [T, K] times
    the transposed weights of layer names[i]."""

    names: tuple[str, ...]
    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """The first stage of attention: queries times the keys of each KV head."""

    block: int


@dataclass(frozen=True)
class WeightedValues:
    """The second stage of attention: softmax weights times the values of each KV head."""

    block: int


@dataclass(frozen=True)
class Attention:
    """Attention of a block with the KV cache: `target` = softmax(`source` times keys) times values,
    FP16 in and out."""

    block: int
    source: str
    target: str

    @property
    def stages(self) -> tuple[Scores, WeightedValues]:
        """What the array computes; the softmax comes between, the normalisation after it."""
        return Scores(self.block), WeightedValues(self.block)


Step = Vector | Linears | Attention
Stage = Linears | Scores | WeightedValues


def pass_schedule(config: ModelConfig, *, prefill: bool = False) -> list[Step]:
    """The steps of a pass.

    A pass gives the logits of its rows, whether it drafts or verifies. With `prefill` it only fills
    the KV cache, and ends when the last block's keys and values are stored.
    """
    weights = {name for name, _ in tensor_shapes(config)}
    steps: list[Step] = [
        Vector(Operation.EMBED, (), "h", "embedding", factor=config.embedding_scale)
    ]

    def normalize(weight: str, source: str, target: str, factor: float = 1.0) -> None:
        steps.append(Vector(Operation.NORM, (source,), target, weight, factor=factor))

    def enter(weight: str, factor: float = 1.0) -> None:
        """The residual stream, normalised, for the array."""
        normalize(weight, "h", "x", factor)
        steps.append(Vector(Operation.ROUND, ("x",), "x"))

    def multiply(names: Iterable[str], targets: tuple[str, ...]) -> None:
        names = tuple(names)
        steps.append(Linears(names, "x", targets))
        for name, target in zip(names, targets, strict=True):
            if name + ".bias" in weights:
                steps.append(Vector(Operation.ADD_BIAS, (target,), target, name + ".bias"))

    def leave(weight: str) -> None:
        """What the array gives, normalised if the model does so, to the residual stream."""
        if weight in weights:
            normalize(weight, "y", "y")
        steps.append(Vector(Operation.ADD, ("h", "y"), "h", factor=config.residual_scale))

    def rotate(block: int, name: str) -> None:
        """Queries or keys, normalised and rotated if the model does so, for attention."""
        if (weight := f"block.{block}.{name}_norm") in weights:
            steps.append(Vector(Operation.HEAD_NORM, (name,), name, weight))
        operation = Operation.ROTATE if config.is_rotated(block) else Operation.ROUND
        steps.append(Vector(operation, (name,), name, block=block))

    for block in range(config.blocks):
        prefix = f"block.{block}."
        q, k, v, o, gate, up, down = (prefix + name for name in LINEARS)
        enter(prefix + "attn_norm")
        multiply((q, k, v), ("q", "k", "v"))
        rotate(block, "k")
        steps.append(Vector(Operation.ROUND, ("v",), "v", block=block))
        steps.append(Vector(Operation.STORE, ("k", "v"), "", block=block))
        if prefill and block == config.blocks - 1:
            return steps
        rotate(block, "q")
        steps.append(Attention(block, "q", "x"))
        multiply((o,), ("y",))
        leave(prefix + "post_attn_norm")
        enter(prefix + "ffn_norm")
        multiply((gate, up), ("gate", "up"))
        steps.append(Vector(Operation.GATE, ("gate", "up"), "x"))
        multiply((down,), ("y",))
        leave(prefix + "post_ffn_norm")
    steps.append(Vector(Operation.SELECT, ("h",), "h"))
    enter("final_norm", config.logit_scale)
    multiply(("head",), ("logits",))
    return steps


def stages(schedule: Iterable[Step]) -> list[Stage]:
    """What the array computes, in order; vector work lies between a stage and the next."""
    found: list[Stage] = []
    for step in schedule:
        if isinstance(step, Attention):
            found += step.stages
        elif isinstance(step, Linears):
            found.append(step)
    return found
