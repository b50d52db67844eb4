# SPDX-License-Identifier: Apache-2.0
"""What passes read and write, and cycles of a product, from dimensions alone.

Cycles are those of the generated engine (`speq.hw.array.gemm_engine`): a tile of `cols` outputs
takes one cycle per weight word of a column, which is K in verify mode and a quarter of K in draft
mode, but at least as many cycles as there are tokens. Cycles of whole passes, everything included,
are those of `speq.model.pass_cycles`.

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

from collections.abc import Mapping
from dataclasses import dataclass, replace

from speq.model.checkpoint import ModelConfig, linear_names, linear_shapes
from speq.model.number_format import FormatConfig, draft_words, residual_words

Formats = Mapping[str, FormatConfig]


@dataclass(frozen=True)
class Engine:
    """What cycles and the padding of planes depend on.

    Attributes
    ----------
    rows, cols : int
        Of the array; `cols` is also what planes and group bytes are padded to.
    fill : int
        Cycles from a command to its first weight word (`GemmEngine.FILL`).
    overhead : int
        Cycles from a tile's last weight word to its first result (`GemmEngine.OVERHEAD`; that of
        an engine that can draft).

    Raises
    ------
    ValueError
        If there is no row or no column.
    """

    rows: int = 8
    cols: int = 16
    fill: int = 2
    overhead: int = 14

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class PassCost:
    """Cost of one pass.

    Attributes
    ----------
    weights, groups, kv : int
        Bytes of weights, group bytes and KV entries that are moved.
    """

    weights: int
    groups: int
    kv: int

    @property
    def bytes(self) -> int:
        """All bytes moved."""
        return self.weights + self.groups + self.kv


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
    weights = groups = 0
    for name, (o, k) in linear_shapes(config).items():
        if name in formats:
            padded = _padded(o, engine)
            words = draft_words(k) + residual_words(k)
            weights += 2 * words * padded
            groups += -(-k // formats[name].group) * padded
        else:
            weights += 2 * k * o
    return PassCost(weights, groups, kv_bytes(config, context, tokens))


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
    weights = groups = 0
    for name, (o, k) in linear_shapes(config).items():
        if name == "head" and drafted_outputs is not None:
            o = drafted_outputs
        if name in formats:
            padded = _padded(o, engine)
            weights += 2 * draft_words(k) * padded
            groups += -(-k // formats[name].group) * padded
        else:
            weights += 2 * k * o
    cost = PassCost(weights, groups, kv_bytes(config, context, 1))
    if not reranked_tiles or "head" not in formats:
        return cost
    _, k = linear_shapes(config)["head"]
    words = draft_words(k) + residual_words(k)
    outputs = reranked_tiles * engine.cols
    return replace(
        cost,
        weights=cost.weights + 2 * words * outputs,
        groups=cost.groups + -(-k // formats["head"].group) * outputs,
    )


def _padded(outputs: int, engine: Engine) -> int:
    """Output rows of an encoded tensor with the padding of its last tile."""
    return -(-outputs // engine.cols) * engine.cols
