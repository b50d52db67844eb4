# SPDX-License-Identifier: Apache-2.0
"""Float32 emulation of decoding, batched: for calibration and evaluation, where exactness is not.

The bit-exact forward pass takes seconds per hundred tokens; fitting and comparing drafts takes
hundreds of thousands. Here every matrix product is an ordinary float32 one, of the same operands
(FP16, or draft weights and 8-bit block activations), and everything else is `speq.model.vector_ops`
as in the exact pass, but for attention weights, which are not rounded to FP16. Logits of the target
differ from the exact ones by some thousandths, those of a draft by up to a tenth, where a different
rounding moves an 8-bit activation; that now and then decides a near tie. They also depend on the
batch: nothing here is part of a contract.

Greedy speculation can be studied without verify passes, because what the target answers is known:
it is the target's own text. `draft_chains` drafts from every position of a text, with the target's
keys and values before it, and `replay` looks up what speculation with given settings would have
done with those chains, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from speq.model.checkpoint import Model, ModelConfig, linear_names
from speq.model.draft_tree import Proposal, chain_ends, free_proposal, grow
from speq.model.format import EncodedTensor
from speq.model.speculation import Settings, Step, committed_step
from speq.model.transformer import (
    Linear,
    NonFiniteError,
    prepare_draft_linears,
    rotary_tables,
    run_blocks,
)

# Rows of a pass: enough to make products of matrices efficient, few enough for the caches.
_BATCH_ROWS = 256

Activations = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt and the greedy continuation of a model, with the keys and values of its passes.

    Attributes
    ----------
    prompt, tokens : token ids
    keys, values : torch.float16 [blocks, kv_heads, S, D]
        Of all tokens but the last, S = len(prompt) + len(tokens) - 1; keys are rotated.
    """

    prompt: list[int]
    tokens: list[int]
    keys: torch.Tensor = field(repr=False)
    values: torch.Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Chains:
    """What a draft model proposes behind every position of a text.

    Attributes
    ----------
    choices : torch.int64 [P, L, C]
        The C likeliest tokens, the likeliest first, of each of the L passes of a chain that starts
        at continuation token p. Pass j follows the chain's own first choices before it.
    scores : torch.float32 [P, L, C]
        Their logits.
    """

    choices: torch.Tensor
    scores: torch.Tensor


def float_weights(model: Model) -> dict[str, torch.Tensor]:
    """The weights of all linear layers as float32 [O, K]."""
    return {
        name: model.linear_weight(name).to(torch.float32) for name in linear_names(model.config)
    }


def float_linear(
    weights: Mapping[str, torch.Tensor], activations: Activations | None = None
) -> Linear:
    """Linear layers with weights float32 [O, K], on activations(name, x) instead of x if given."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        x = activations(name, x) if activations else x.to(torch.float32)
        return x @ weights[name].T

    return linear


def draft_linear(encoded: Mapping[str, EncodedTensor], otherwise: Linear | None = None) -> Linear:
    """Encoded layers in draft numerics (8-bit block activations); others as in `otherwise`."""
    layers = prepare_draft_linears(encoded)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        if otherwise is not None and name not in layers:
            return otherwise(name, x)
        layer = layers[name]
        return layer.pad(layer.quantize(x).values() @ layer.operand.values.T)

    return linear


def reranked_linear(linear: Linear, head: torch.Tensor, count: int) -> Linear:
    """The same layers, but of the head only the `count` largest outputs of each row, computed from
    its weights float32 [V, K]; all others are -infinity."""

    def exact(name: str, x: torch.Tensor) -> torch.Tensor:
        y = linear(name, x)
        if name != "head":
            return y
        best = torch.topk(y, min(count, y.shape[1])).indices
        known = torch.einsum("tk,tnk->tn", x.to(torch.float32), head[best])
        known = known.where(y.gather(1, best) > -torch.inf, -torch.inf)
        return torch.full_like(y, -torch.inf).scatter_(1, best, known)

    return exact


def attend_masked(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of queries float16 [N, heads, T, D] to float32 [N, kv_heads, S, D] where mask
    [N, 1, T, S] is True -> float16 [N * T, heads * D]."""
    y = F.scaled_dot_product_attention(
        q.to(torch.float32), keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2).flatten(0, 1).flatten(1).to(torch.float16)


def _visible(config: ModelConfig, distance: torch.Tensor) -> list[torch.Tensor]:
    """Masks of global and of sliding-window attention, by how far a key lies behind a query."""
    mask = distance >= 0
    window = config.sliding_window
    return [mask, mask if window is None else mask & (distance < window)]


def prefill(
    model: Model,
    tokens: Sequence[int],
    linear: Linear,
    logit_rows: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pass over a whole text: logits float32 [rows, V], and keys and values of all its tokens,
    float16 [blocks, kv_heads, T, D]."""
    c = model.config
    keys, values = [], []
    positions = torch.arange(len(tokens))
    masks = _visible(c, positions[:, None] - positions)

    def store(block: int, k: torch.Tensor, v: torch.Tensor) -> None:
        keys.append(k.transpose(0, 1))
        values.append(v.transpose(0, 1))

    def attend(block: int, q: torch.Tensor) -> torch.Tensor:
        mask = masks[not c.is_global(block)]
        k, v = keys[-1].to(torch.float32)[None], values[-1].to(torch.float32)[None]
        return attend_masked(q.transpose(0, 1)[None], k, v, mask, c.attention_scale)

    tables = rotary_tables(model, positions)
    logits = run_blocks(model, torch.tensor(tokens), tables, linear, store, attend, logit_rows)
    return logits, torch.stack(keys), torch.stack(values)


def logits(model: Model, tokens: Sequence[int], linear: Linear | None = None) -> torch.Tensor:
    """Logits float32 [T, V] behind every token of a text; the FP16 target's if no linear given."""
    return prefill(model, tokens, linear or float_linear(float_weights(model)))[0]


def recache(model: Model, text: Text, linear: Linear) -> Text:
    """The same tokens with the keys and values that `linear` gives: an external draft model's."""
    tokens = [*text.prompt, *text.tokens[:-1]]
    _, keys, values = prefill(model, tokens, linear, slice(-1, None))
    return replace(text, keys=keys, values=values)


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    linear: Linear | None = None,
    stop_ids: frozenset[int] = frozenset(),
) -> list[Text]:
    """Greedy continuations of all prompts, token by token in one batch.

    Parameters
    ----------
    prompts : token ids, at least one each
    max_tokens : int
        A text ends after this many tokens, behind a stop token, or where the context ends.
    linear : Linear, optional
        The linear layers; those of the FP16 target when not given.

    Raises
    ------
    ValueError
        If a prompt is empty or leaves no room in the model's context.
    NonFiniteError
        If logits are NaN or +infinity. It names the head, wherever the first such result was.
    """
    c = model.config
    linear = linear or float_linear(float_weights(model))
    for prompt in prompts:
        if not 1 <= len(prompt) < c.context:
            raise ValueError(f"a prompt has {len(prompt)} tokens; expected 1 to {c.context - 1}")
    capacity = min(max(map(len, prompts), default=0) + max_tokens, c.context)
    keys = torch.zeros(c.blocks, len(prompts), c.kv_heads, capacity, c.head_dim)
    values = torch.zeros_like(keys)
    texts: list[list[int]] = [[] for _ in prompts]
    for n, prompt in enumerate(prompts):
        rows, k, v = prefill(model, prompt, linear, slice(-1, None))
        _check_logits(rows, torch.tensor([len(prompt) - 1]))
        keys[:, n, :, : len(prompt)], values[:, n, :, : len(prompt)] = k, v
        texts[n].append(int(rows[0].argmax()))

    def is_open(n: int) -> bool:
        limit = min(max_tokens, c.context - len(prompts[n]))
        return len(texts[n]) < limit and texts[n][-1] not in stop_ids

    while rows := [n for n in range(len(prompts)) if is_open(n)]:
        positions = torch.tensor([len(prompts[n]) + len(texts[n]) - 1 for n in rows])
        length = int(positions.max()) + 1
        masks = _visible(c, (positions[:, None] - torch.arange(length))[:, None, None])

        def store(
            block: int,
            k: torch.Tensor,
            v: torch.Tensor,
            rows: list[int] = rows,
            positions: torch.Tensor = positions,
        ) -> None:
            keys[block, rows, :, positions] = k.to(torch.float32)
            values[block, rows, :, positions] = v.to(torch.float32)

        def attend(
            block: int,
            q: torch.Tensor,
            rows: list[int] = rows,
            length: int = length,
            masks: list[torch.Tensor] = masks,
        ) -> torch.Tensor:
            every = slice(None) if len(rows) == len(prompts) else rows
            seen = masks[not c.is_global(block)]
            known_keys, known_values = (t[block, every, :, :length] for t in (keys, values))
            q = q[:, :, None]
            return attend_masked(q, known_keys, known_values, seen, c.attention_scale)

        last = torch.tensor([texts[n][-1] for n in rows])
        step = run_blocks(model, last, rotary_tables(model, positions), linear, store, attend)
        _check_logits(step, positions)
        for n, token in zip(rows, step.argmax(dim=1).tolist(), strict=True):
            texts[n].append(token)

    result = []
    for n, (prompt, tokens) in enumerate(zip(prompts, texts, strict=True)):
        used = len(prompt) + len(tokens) - 1
        entries = (cache[:, n, :, :used].to(torch.float16) for cache in (keys, values))
        result.append(Text(list(prompt), tokens, *entries))
    return result


def _check_logits(logits: torch.Tensor, positions: torch.Tensor) -> None:
    """Raises NonFiniteError if logits [N, V] at positions [N] are NaN or +infinity."""
    bad = (~(logits < torch.inf)).any(dim=1).nonzero()
    if len(bad):
        raise NonFiniteError("verify", "head", int(positions[bad[0]]))


def draft_chains(
    model: Model,
    texts: Sequence[Text],
    linear: Linear,
    length: int = 7,
    kept: int = 4,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Chains]:
    """Draft a chain of `length` tokens behind every continuation position of every text.

    Parameters
    ----------
    linear : the draft model's linear layers
    kept : choices that are kept of each pass, at least 2 (the margin needs them)
    progress : called with the number of chains finished since the last call
    """
    starts = [(n, p) for n, text in enumerate(texts) for p in range(len(text.tokens))]
    choices, scores = [], []
    for first in range(0, len(starts), _BATCH_ROWS):
        batch = starts[first : first + _BATCH_ROWS]
        some = _draft_batch(model, texts, batch, linear, length, kept)
        choices.append(some[0])
        scores.append(some[1])
        if progress:
            progress(len(batch))
    counts = [len(text.tokens) for text in texts]
    parts = (torch.cat(rows).split(counts) for rows in (choices, scores))
    return [Chains(*pair) for pair in zip(*parts, strict=True)]


def _draft_batch(
    model: Model,
    texts: Sequence[Text],
    starts: Sequence[tuple[int, int]],
    linear: Linear,
    length: int,
    kept: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chains from the given (text, continuation position) pairs, which are in rising order:
    choices int64 and scores float32 [rows, length, kept]."""
    c = model.config
    roots = [texts[n].prompt[-1] if p == 0 else texts[n].tokens[p - 1] for n, p in starts]
    first = torch.tensor([len(texts[n].prompt) - 1 + p for n, p in starts])  # root's position
    own = torch.zeros(2, c.blocks, len(starts), c.kv_heads, length, c.head_dim)
    spans: dict[int, list[int]] = {}
    for row, (n, _) in enumerate(starts):
        spans.setdefault(n, []).append(row)

    tokens = torch.tensor(roots)
    choices = torch.empty(len(starts), length, kept, dtype=torch.int64)
    scores = torch.empty(len(starts), length, kept)
    for j in range(length):

        def store(block: int, k: torch.Tensor, v: torch.Tensor, j: int = j) -> None:
            own[0, block, :, :, j] = k.to(torch.float32)
            own[1, block, :, :, j] = v.to(torch.float32)

        def attend(block: int, q: torch.Tensor, j: int = j) -> torch.Tensor:
            parts = []
            for n, rows in spans.items():
                span = slice(rows[0], rows[-1] + 1)
                past = int(first[span].max())
                keys, values = (t[block, :, :past] for t in (texts[n].keys, texts[n].values))
                drafted = own[:, block, span, :, : j + 1]
                window = None if c.is_global(block) else c.sliding_window
                parts.append(_attend_chain(q[span], keys, values, drafted, first[span], window, c))
            return torch.cat(parts)

        rows = run_blocks(model, tokens, rotary_tables(model, first + j), linear, store, attend)
        scores[:, j], choices[:, j] = torch.topk(rows, kept)
        tokens = choices[:, j, 0]
    return choices, scores


def _attend_chain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    drafted: torch.Tensor,
    first: torch.Tensor,
    window: int | None,
    config: ModelConfig,
) -> torch.Tensor:
    """Attention of one query per chain, [R, heads, D], to its text's entries [kv_heads, S, D]
    before the chain's first position [R] and to its own, drafted [2, R, kv_heads, J, D]."""
    rows, heads, d = q.shape
    kv_heads, past, _ = keys.shape
    steps = drafted.shape[3]
    q = q.to(torch.float32).view(rows, kv_heads, heads // kv_heads, d)
    shared = torch.einsum("rhgd,hsd->rhgs", q, keys.to(torch.float32))
    recent = torch.einsum("rhgd,rhjd->rhgj", q, drafted[0])
    scores = torch.cat([shared, recent], dim=3) * config.attention_scale
    position = torch.cat(
        [torch.arange(past).expand(rows, -1), first[:, None] + torch.arange(steps)], dim=1
    )
    # Of the text, only what lies before the chain; of the chain, everything so far.
    hidden = torch.cat(
        [position[:, :past] >= first[:, None], torch.zeros(rows, steps, dtype=torch.bool)], dim=1
    )
    if window is not None:
        hidden |= (first[:, None] + steps - 1 - position) >= window
    weights = scores.masked_fill_(hidden[:, None, None], -torch.inf).softmax(dim=3)
    y = torch.einsum("rhgs,hsd->rhgd", weights[..., :past], values.to(torch.float32))
    y += torch.einsum("rhgj,rhjd->rhgd", weights[..., past:], drafted[1])
    return y.reshape(rows, heads * d).to(torch.float16)


def replay(text: Text, chains: Chains, settings: Settings) -> list[Step]:
    """The steps of greedy speculation with these settings along a text.

    As `speculation.generate` takes them when it generates the text's tokens, if the chains were
    drafted with as many tokens re-ranked as the settings say; the steps have no logits. Raises
    ValueError if the chains are shorter or have fewer choices than the settings.
    """
    _, length, kept = chains.choices.shape
    if settings.length > length or settings.offered > kept:
        raise ValueError(
            f"chains of {length} tokens with {kept} choices cannot replay settings that need "
            f"{settings.length} and {settings.offered}"
        )
    policy, rows = settings.policy, settings.rows
    choices = chains.choices[..., : settings.offered].tolist()
    scores = chains.scores[..., : max(2, settings.offered)]
    gaps = (scores[..., :1] - scores).tolist()
    history = list(text.prompt)
    steps, position = [], 0
    while position < len(text.tokens):
        target = text.tokens[position:]
        most = len(target) - 1
        seen = history[-settings.history :]
        limit = min(settings.length, most)
        proposal = Proposal()
        free = free_proposal(policy, seen, rows, most) if limit else None
        if free is not None:
            proposal = free
        elif limit:
            margins = [gap[1] for gap in gaps[position][:limit]]
            drafted = next(
                (
                    j + 1
                    for j in range(limit)
                    if chain_ends(policy, settings.threshold, margins[: j + 1])
                ),
                limit,
            )
            chain = choices[position][:drafted], gaps[position][:drafted]
            proposal = grow(policy, seen, *chain, rows, most)
        path = [0]
        for token in target[:most]:
            found = [r for r in proposal.children(path[-1]) if proposal.tokens[r - 1] == token]
            if not found:
                break
            path.append(found[0])
        committed = target[: len(path)]
        step = committed_step(
            committed,
            path,
            torch.empty(proposal.rows, 0),
            proposal,
            stop_ids=frozenset(),
            repeated=False,
        )
        steps.append(step)
        history += committed
        position += len(committed)
    return steps
