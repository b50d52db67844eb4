# SPDX-License-Identifier: Apache-2.0
"""The exact forward pass: a decoder-only transformer whose every bit is defined.

Every matrix product is an exact dot product rounded once (`speq.model.arith`), everything between
them is `speq.model.vector_ops`. A row's logits therefore depend on its token, its position and the
cache entries that it attends to, and on nothing else: not on the other rows of the pass, nor on
where in the cache those entries lie. That is contract C4's ground.

A draft pass is the same pass with the draft weights inside the encoded linear layers and 8-bit
block activations; attention's own products (queries with keys, weights with values) always run in
verify mode on FP16 operands, as on the array.

A product with a result that is not finite ends the pass with a `NonFiniteError`, as it ends a run
of the accelerator with NONFINITE: activations have left FP16's range, and nothing that follows from
them is worth anything.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from speq.model.arith import (
    BlockActivations,
    WeightOperand,
    draft_gemm,
    prepare_draft,
    quantize_activations,
    to_float16,
    verify_gemm,
)
from speq.model.checkpoint import Model, ModelConfig
from speq.model.format import EncodedTensor
from speq.model.schedule import Attention, Linears, Operation, Step, Vector, pass_schedule
from speq.model.vector_ops import (
    gated,
    head_norm,
    normalize,
    ranked,
    rms_norm,
    rotary_table,
    rotate,
    softmax_weights,
)

Capture = Callable[[str, torch.Tensor], None]
Linear = Callable[[str, torch.Tensor], torch.Tensor]
Store = Callable[[int, torch.Tensor, torch.Tensor], None]
Attend = Callable[[int, torch.Tensor], torch.Tensor]
RotaryTable = tuple[torch.Tensor, torch.Tensor]


class NonFiniteError(ValueError):
    """A product of a pass, a linear layer's or one of attention's two, has a result that is not
    finite.

    Attributes
    ----------
    kind : str
        Of the pass: "prompt", "draft" or "verify".
    layer : str
        The first such product of the pass: a linear layer's name, or "block.3.scores" (queries
        times keys) or "block.3.values" (weights times values).
    position : int
        Of the lowest row with such a result, in the text. In attention, of the lowest row whose
        own query, key or value is not finite.
    step : int, optional
        Of decoding, from 1 on.
    """

    def __init__(self, kind: str, layer: str, position: int, step: int | None = None) -> None:
        super().__init__(kind, layer, position, step)
        self.kind, self.layer, self.position, self.step = kind, layer, position, step

    def __str__(self) -> str:
        where = f"{self.kind} pass" + (f" of step {self.step}" if self.step is not None else "")
        return (
            f"NONFINITE: a result of {self.layer} is not finite at position {self.position}, in "
            f"the {where}: the model's activations leave the range of FP16 on this text"
        )


class KVCache:
    """Keys and values of every block, FP16, in slots that are filled in order.

    A slot's number need not be its position: in a tree several slots share one position.
    Keys are stored rotated, so entries can be moved. Members: `length` (slots in use), `capacity`,
    `positions` int64 [capacity], `keys` and `values` float16 [blocks, kv_heads, capacity,
    head_dim].
    """

    def __init__(self, config: ModelConfig, capacity: int = 2048) -> None:
        shape = (config.blocks, config.kv_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.length = 0
        self.positions = torch.zeros(capacity, dtype=torch.int64)
        self.keys = torch.zeros(shape, dtype=torch.float16)
        self.values = torch.zeros(shape, dtype=torch.float16)

    def store(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes float16 [T, kv_heads, head_dim] behind the slots in use, which `length` does not
        count yet."""
        stop = self.length + len(keys)
        self.keys[block, :, self.length : stop] = keys.transpose(0, 1)
        self.values[block, :, self.length : stop] = values.transpose(0, 1)

    def entries(self, block: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's keys and values in the first `count` slots, [kv_heads, count, head_dim]."""
        return self.keys[block, :, :count], self.values[block, :, :count]

    def reserve(self, capacity: int) -> None:
        """Makes room for at least so many slots."""
        more = max(0, capacity - self.capacity)
        self.positions = F.pad(self.positions, (0, more))
        self.keys = F.pad(self.keys, (0, 0, 0, more))
        self.values = F.pad(self.values, (0, 0, 0, more))
        self.capacity += more

    def truncate(self, length: int) -> None:
        """Drops every slot from `length` on. Raises ValueError if it exceeds the slots in use."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} cache slots to {length}")
        self.length = length

    def keep(self, start: int, slots: Sequence[int]) -> None:
        """Of the slots from `start` on, keeps only `slots`, moved to start, start + 1, ... in the
        given order. For the accepted rows of a tree. Raises ValueError if a slot is not in use."""
        if not all(start <= slot < self.length for slot in slots):
            raise ValueError(f"slots {list(slots)} are not all within {start}..{self.length - 1}")
        source = torch.tensor(slots, dtype=torch.int64)
        stop = start + len(slots)
        self.keys[:, :, start:stop] = self.keys[:, :, source]
        self.values[:, :, start:stop] = self.values[:, :, source]
        self.positions[start:stop] = self.positions[source]
        self.length = stop


@dataclass(frozen=True)
class DraftLinear:
    """A linear layer [O, K] prepared for draft passes.

    Members: the weights of the outputs that are drafted, the activations' block size, and O.
    """

    operand: WeightOperand
    block: int
    outputs: int

    def quantize(self, x: torch.Tensor) -> BlockActivations:
        """Activations float16 [T, K] as this layer multiplies them."""
        return quantize_activations(x, self.block)

    def pad(self, y: torch.Tensor) -> torch.Tensor:
        """Products [T, drafted outputs] -> [T, O]: outputs that are not drafted are -inf."""
        missing = self.outputs - y.shape[1]
        return F.pad(y, (0, missing), value=-math.inf) if missing else y


def prepare_draft_linears(encoded: Mapping[str, EncodedTensor]) -> dict[str, DraftLinear]:
    """Unpacks encoded linear layers (names as in `linear_names`) for `forward(draft=...)`.

    The result takes 4 bytes per weight. Activation blocks are aligned with the weight groups.
    """
    return {name: prepare_draft_linear(tensor) for name, tensor in encoded.items()}


def prepare_draft_linear(tensor: EncodedTensor) -> DraftLinear:
    """Prepares one encoded linear layer."""
    return DraftLinear(prepare_draft(tensor), tensor.config.group, tensor.shape[0])


#: What the tokens of a pass are ranked by, from its logits float32 [T, V], of the same shape.
Scores = Callable[[torch.Tensor], torch.Tensor]


def rerank(
    x: torch.Tensor,
    logits: torch.Tensor,
    head: torch.Tensor,
    count: int,
    scores: Scores | None = None,
) -> torch.Tensor:
    """Logits float32 [T, V] of which the `count` best of each row are replaced by the exact ones
    and all others by -infinity.

    Parameters
    ----------
    x : torch.float16 [T, K]
        The head's input.
    logits : torch.float32 [T, V]
        Of the draft head; -infinity where it has no output.
    head : torch.float16 [V, K]
    count : int
        If fewer are larger than -infinity, only those.
    scores : optional
        What the best are those of; the logits themselves when not given.
    """
    exact = torch.full_like(logits, -math.inf)
    for row, drafted in enumerate(logits if scores is None else scores(logits)):
        best = ranked(drafted, count)
        best = best[drafted[best] > -math.inf]
        exact[row, best] = verify_gemm(x[row : row + 1], head[best])[0]
    return exact


def forward(
    model: Model,
    tokens: Sequence[int],
    cache: KVCache,
    *,
    positions: Sequence[int] | None = None,
    mask: torch.Tensor | None = None,
    draft: Mapping[str, DraftLinear] | None = None,
    reranked: int = 0,
    scores: Scores | None = None,
    logit_rows: slice = slice(None),
    capture: Capture | None = None,
) -> torch.Tensor:
    """One pass over `tokens`: appends T entries to the cache and returns logits float32 [rows, V].

    Parameters
    ----------
    tokens : T token ids
        Row i of the pass is token i and fills cache slot cache.length + i.
    positions : T positions in the text
        By default they continue the cache: cache.length, cache.length + 1, ...
    mask : torch.bool [T, cache.length + T]
        Row i attends to the slots that are True, which must include its own (cache.length + i). By
        default a row attends to all earlier slots and itself.
    draft : from `prepare_draft_linears`
        Makes it a draft pass: these linear layers use draft numerics, all others verify numerics.
    reranked : of a draft pass, how many of a row's best logits are computed exactly, from the FP16
        head; all others are then -infinity. 0: the draft head's own logits.
    scores : what the best of these are found by, as of `rerank`
    logit_rows : slice of the rows whose logits are wanted; the head is the largest layer.
    capture : called with (name of linear layer, its float16 input [T, K]) in the order of the pass.

    Raises
    ------
    ValueError
        If a token is not in the vocabulary, the cache is too small or a shape does not fit.
    NonFiniteError
        If a product has a result that is not finite.

    The cache has the same slots in use then as before.
    """
    arguments = _checked_arguments(model.config, tokens, cache, positions, mask)
    kind = "verify" if draft is None else "draft"
    schedule = pass_schedule(model.config)
    return _run_pass(
        *(model, kind, schedule, arguments, cache, draft or {}),
        *(reranked, scores, logit_rows, capture),
    )


def prefill(model: Model, tokens: Sequence[int], cache: KVCache) -> None:
    """Appends the entries of `tokens`, which continue the cache's, in one pass without logits.

    Raises as `forward` does; a `NonFiniteError` names the lowest position that has a result that is
    not finite, and its first product, as if the tokens had come one at a time.
    """
    start = cache.length
    arguments = _checked_arguments(model.config, tokens, cache, None, None)
    schedule = pass_schedule(model.config, prefill=True)
    try:
        _run_pass(model, "prompt", schedule, arguments, cache)
    except NonFiniteError as error:
        # A row before it may fail in a later product.
        if error.position > start:
            prefill(model, tokens[: error.position - start], cache)
            cache.truncate(start)
        raise


def _run_pass(
    model: Model,
    kind: str,
    schedule: Sequence[Step],
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: KVCache,
    draft: Mapping[str, DraftLinear] | None = None,
    reranked: int = 0,
    scores: Scores | None = None,
    logit_rows: slice = slice(None),
    capture: Capture | None = None,
) -> torch.Tensor:
    """A pass with the arguments that `_checked_arguments` gives; the others as of `forward`."""
    c = model.config
    ids, places, allowed = arguments
    cache.positions[cache.length : cache.length + len(ids)] = places
    tables = rotary_tables(model, places)
    window_mask = _sliding_window(c, cache, places, allowed)
    entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # new ones by block

    def check(layer: str, *tensors: torch.Tensor) -> None:
        row = first_nonfinite_row(*tensors)
        if row is not None:
            rows = places[logit_rows] if layer == "head" else places
            raise NonFiniteError(kind, layer, int(rows[row]))

    def check_attention(block: int, *queries: torch.Tensor) -> None:
        # All earlier entries are finite, and so are the softmax's weights.
        keys, values = entries[block]
        check(f"block.{block}.scores", *queries, keys)
        check(f"block.{block}.values", values)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        if capture is not None:
            capture(name, x)
        layer = draft.get(name) if draft else None
        if layer is None:
            y = verify_gemm(x, model.operands[name])
        else:
            y = draft_gemm(layer.quantize(x), layer.operand)
        check(name, y)
        if layer is None:
            return y
        y = layer.pad(y)
        if name == "head" and reranked:
            y = rerank(x, y, model.linear_weight(name), reranked, scores)
            check(name, torch.where(y == -math.inf, 0.0, y))
        return y

    def store(block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        cache.store(block, keys, values)
        entries[block] = keys, values

    def attend(block: int, queries: torch.Tensor) -> torch.Tensor:
        check_attention(block, queries)
        seen = allowed if c.is_global(block) else window_mask
        keys, values = cache.entries(block, allowed.shape[1])
        return attention(queries, keys, values, seen, c.attention_scale)

    logits = run_blocks(model, ids, tables, linear, store, attend, logit_rows, schedule)
    # Without attention in the last block, its entries have been in no product yet.
    check_attention(c.blocks - 1)
    cache.length += len(ids)
    return logits


def first_nonfinite_row(*tensors: torch.Tensor) -> int | None:
    """The lowest row of tensors [T, ...] in which one of them is not finite; None if all are."""
    finite = [
        np.isfinite(tensor.numpy()).reshape(len(tensor), -1).all(axis=1) for tensor in tensors
    ]
    bad = np.flatnonzero(~np.logical_and.reduce(finite))
    return int(bad[0]) if len(bad) else None


@dataclass(frozen=True, eq=False)
class LinearRequest:
    """Linear layers to compute, without their biases: names, and their input x float16 [T, K]."""

    names: tuple[str, ...]
    x: torch.Tensor


@dataclass(frozen=True, eq=False)
class StoreRequest:
    """Keys and values float16 [T, kv_heads, D] of a block to store; keys are rotated."""

    block: int
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class AttentionRequest:
    """Attention of a block to compute, for rotated queries float16 [T, heads, D]."""

    block: int
    queries: torch.Tensor


Request = LinearRequest | StoreRequest | AttentionRequest
# What is sent depends on the request: products, an attention's output, or nothing.
PassSteps = Generator[Request, Any, torch.Tensor | None]


def run_blocks(
    model: Model,
    tokens: torch.Tensor,
    tables: Sequence[RotaryTable],
    linear: Linear,
    store: Store,
    attend: Attend,
    logit_rows: slice = slice(None),
    schedule: Sequence[Step] | None = None,
) -> torch.Tensor:
    """The transformer around its linear layers and its attention: logits float32 [rows, V].

    Parameters
    ----------
    tokens : torch.int64 [T]
    tables : cosines and sines of the rows' positions
        From `rotary_tables`.
    linear : (name, x float16 [T, K]) -> float32 [T, O]
        A linear layer without its bias.
    store : (block, keys, values float16 [T, kv_heads, D]) -> None
        Writes to the KV cache; keys are rotated.
    attend : (block, queries float16 [T, heads, D]) -> float16 [T, heads * D]
        Attention of a block to the KV cache, what was just stored included; queries are rotated.
    schedule : of the pass, optional
        One that gives logits when not given.
    """
    steps = pass_steps(model, schedule or pass_schedule(model.config), tokens, tables, logit_rows)
    answer = None
    try:
        while True:
            match steps.send(answer):
                case LinearRequest(names, x):
                    answer = [linear(name, x) for name in names]
                case StoreRequest(block, keys, values):
                    answer = store(block, keys, values)
                case AttentionRequest(block, queries):
                    answer = attend(block, queries)
    except StopIteration as end:
        return end.value


def pass_steps(
    model: Model,
    schedule: Sequence[Step],
    tokens: torch.Tensor,
    tables: Sequence[RotaryTable],
    logit_rows: slice = slice(None),
) -> PassSteps:
    """The vector work of a pass, which yields what the array and the KV cache are to do and returns
    the logits, or None where the schedule has none.

    For a `LinearRequest` it expects the products, a list of float32 [T, O]; for an
    `AttentionRequest` its output, float16 [T, heads * D]; for a `StoreRequest` nothing. The other
    parameters are those of `run_blocks`.
    """
    c = model.config
    buffers: dict[str, torch.Tensor] = {}
    for step in schedule:
        match step:
            case Linears(names, source, targets):
                products = yield LinearRequest(names, buffers[source])
                buffers.update(zip(targets, products, strict=True))
            case Attention(block, source, target):
                queries = buffers[source].unflatten(1, (-1, c.head_dim))
                buffers[target] = yield AttentionRequest(block, queries)
            case Vector(Operation.STORE, sources, block=block):
                entries = (buffers[name].unflatten(1, (-1, c.head_dim)) for name in sources)
                yield StoreRequest(block, *entries)
            case Vector(Operation.EMBED, target=target, weight=weight):
                rows = model.weights[weight][tokens].to(torch.float32)
                buffers[target] = _scaled(rows, step.factor)
            case Vector(Operation.SELECT, (source,), target):
                buffers[target] = buffers[source][logit_rows]
            case Vector():
                operands = [buffers[name] for name in step.sources]
                buffers[step.target] = _compute(model, step, operands, tables)
    return buffers.get("logits")


def _compute(
    model: Model, step: Vector, operands: list[torch.Tensor], tables: Sequence[RotaryTable]
) -> torch.Tensor:
    """The result [T, n] of an elementwise or row operation."""
    c, x = model.config, operands[0]
    match step.operation:
        case Operation.NORM:
            y = rms_norm(x, model.weights[step.weight], c.norm_eps)
            return _scaled(y, step.factor)
        case Operation.HEAD_NORM:
            heads = x.unflatten(1, (-1, c.head_dim))
            return head_norm(heads, model.weights[step.weight], c.norm_eps).flatten(1)
        case Operation.ROUND:
            return to_float16(x)
        case Operation.ADD_BIAS:
            return x + model.weights[step.weight].to(torch.float32)
        case Operation.ROTATE:
            table = tables[0] if c.is_global(step.block) else tables[1]
            return rotate(x.unflatten(1, (-1, c.head_dim)), *table).flatten(1)
        case Operation.GATE:
            return gated(x, operands[1], c.activation)
        case Operation.ADD:
            return x + _scaled(operands[1], step.factor)
    raise ValueError(f"{step.operation} has no definition")


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """FP32 x times a factor, which is rounded to FP32 first."""
    return x if factor == 1.0 else x * factor


def rotary_tables(model: Model, positions: torch.Tensor) -> list[RotaryTable]:
    """Cosines and sines of positions [T], one pair for each of the model's rotary bases."""
    return [rotary_table(positions, frequencies) for frequencies in model.rotary_frequencies]


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Grouped-query attention, float16 in and out: queries [T, heads, D], keys and values
    [kv_heads, S, D], mask bool [T, S] -> [T, heads * D]. Products in verify mode."""
    rows, heads, _ = queries.shape
    sharing = heads // len(keys)  # query heads per KV head: they share one product
    allowed = mask.repeat_interleave(sharing, dim=0)
    outputs = []
    for q, k, v in zip(queries.split(sharing, dim=1), keys, values, strict=True):
        steps = attention_steps(q.flatten(0, 1), allowed, scale)
        weights = steps.send(verify_gemm(next(steps), k))
        y = finish(steps, verify_gemm(weights, v.T))
        outputs.append(y.unflatten(0, (rows, sharing)))
    return torch.cat(outputs, dim=1).flatten(1)


def attention_steps(
    queries: torch.Tensor, allowed: torch.Tensor, scale: float
) -> Generator[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The vector work of attention, which yields the left operands of its two products.

    First the queries, float16 [..., N, D]: it expects their products with the keys, float32
    [..., N, S]. Then the softmax weights, float16 [..., N, S]: it expects their products with the
    values, float32 [..., N, D], and returns the attention, float16 of this shape. Row n attends to
    the slots where allowed [..., N, S] is True.
    """
    scores = yield queries
    weights, denominators = softmax_weights(scores, allowed, scale)
    return normalize((yield weights), denominators)


def finish(
    steps: Generator[torch.Tensor, torch.Tensor, torch.Tensor], answer: torch.Tensor
) -> torch.Tensor:
    """What a generator that needs just this answer returns."""
    try:
        steps.send(answer)
    except StopIteration as end:
        return end.value
    raise RuntimeError("the generator has more steps")


def linear_inputs(model: Model, tokens: Sequence[int], block: int) -> dict[str, torch.Tensor]:
    """The float16 inputs [T, K] of the seven linear layers of `block` for the text `tokens`, keyed
    by their short names (LINEARS). Raises ValueError if there is no such block."""
    if not 0 <= block < model.config.blocks:
        raise ValueError(f"block {block} is not within 0..{model.config.blocks - 1}")
    inputs = {}
    prefix = f"block.{block}."

    def capture(name: str, x: torch.Tensor) -> None:
        if name.startswith(prefix):
            inputs[name.removeprefix(prefix)] = x

    cache = KVCache(model.config, len(tokens))
    forward(model, tokens, cache, logit_rows=slice(-1, None), capture=capture)
    return inputs


def _checked_arguments(
    config: ModelConfig,
    tokens: Sequence[int],
    cache: KVCache,
    positions: Sequence[int] | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and positions as int64 [T], the mask as bool [T, cache.length + T]."""
    rows, start = len(tokens), cache.length
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if rows == 0 or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(f"tokens must be one or more ids within 0..{config.vocab_size - 1}")
    if start + rows > cache.capacity:
        raise ValueError(
            f"{rows} tokens do not fit into the KV cache ({start} of {cache.capacity} slots are in "
            "use): make it with a larger capacity"
        )
    places = torch.as_tensor(
        list(range(start, start + rows) if positions is None else positions), dtype=torch.int64
    )
    if places.shape != (rows,) or int(places.min()) < 0:
        raise ValueError(f"positions must be {rows} numbers from 0 on")
    if mask is None:
        mask = torch.ones(rows, start + rows, dtype=torch.bool).tril(start)
    if mask.dtype != torch.bool or mask.shape != (rows, start + rows):
        raise ValueError(f"mask must be bool [{rows}, {start + rows}], one column per slot")
    if not mask[:, start:].diagonal().all():
        raise ValueError("mask must let every row attend to itself")
    return ids, places, mask


def _sliding_window(
    config: ModelConfig, cache: KVCache, positions: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The mask without the slots whose positions have left the sliding window, if there is one."""
    if config.sliding_window is None:
        return mask
    distance = positions[:, None] - cache.positions[None, : mask.shape[1]]
    return mask & (distance < config.sliding_window)
