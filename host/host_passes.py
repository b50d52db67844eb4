# SPDX-License-Identifier: Apache-2.0
"""Passes of an accelerator without a vector unit: the vector work is done here.

Everything between the products, that is norms, rotary embedding, softmax and activations, is done
with the golden model's operations (`pass_steps` and `attention_steps` of `speq.model.transformer`),
whenever a HOST descriptor asks for it. So all bits are the golden model's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch

from speq.host.board import Board
from speq.host.host_layout import HostLayout, host_argument
from speq.host.kv_entries import KVEntries
from speq.host.layout import (
    activation_words,
    draft_activation_words,
    ranking_bytes,
    ranking_margin,
    results_bytes,
    unpack_batches,
)
from speq.host.passes import NO_PASS, Observe, Pass, Passes, read_pass, read_results
from speq.host.run_control import RunControl
from speq.hw.accelerator_config import PassKind
from speq.hw.engine_config import Mode
from speq.model.arith import quantize_activations
from speq.model.checkpoint import Model, ModelConfig
from speq.model.speculation import pass_mask
from speq.model.transformer import (
    AttentionRequest,
    LinearRequest,
    PassSteps,
    Request,
    StoreRequest,
    attention_steps,
    finish,
    first_nonfinite_row,
    pass_steps,
    rotary_tables,
)


class HostPasses(Passes):
    """Passes whose HOST descriptors are served.

    Parameters
    ----------
    board : Board
    control : RunControl
    layout : HostLayout
    model : Model
    capacity : int
        Entries of the KV cache.
    observe : callable
        Called before each HOST descriptor is served.
    """

    def __init__(
        self,
        board: Board,
        control: RunControl,
        layout: HostLayout,
        model: Model,
        capacity: int,
        observe: Observe,
    ) -> None:
        self._board, self._control, self._observe = board, control, observe
        self._layout, self._model, self._config = layout, model, layout.config
        self._tables = rotary_tables(model, torch.arange(capacity))
        self._kv = KVEntries(board, layout)
        self.margins = []
        self.reranked = 0
        self._operands: tuple[torch.Tensor, ...] = ()  # [T, ...], of the stage under way

    def fill(self, current: Pass) -> None:
        self._control.start()
        self._control.expect("HOST")
        self._serve(current)
        self._control.expect("IDLE")

    def begin(self) -> None:
        self.current = NO_PASS

    def step(self) -> str:
        while (state := self._control.expect("HOST", "STEP", "IDLE")) == "HOST":
            self._serve(self._next_pass())
        return state

    def nonfinite_row(self, product: str) -> int | None:
        return first_nonfinite_row(*self._operands)

    def accept(self, start: int, rows: Sequence[int]) -> None:
        for depth, row in enumerate(rows):
            if row != depth:
                # Its place is behind the accepted ones. No later one is there: rows rise.
                self._kv.move(start + row, start + depth)

    def _next_pass(self) -> Pass:
        """The pass of a decoding run whose first HOST descriptor waits."""
        following, index = read_pass(self._control.registers)
        if following.kind is PassKind.DRAFT and index == 0:
            self.margins = []
        elif self.current.kind is PassKind.DRAFT:
            self.margins.append(self._read_margin())
        else:
            self.margins = []
        return following

    def _read_margin(self) -> float:
        """The logit margin of the draft pass that has just ended."""
        content = self._board.read(self._layout.ranking, ranking_bytes(self._config))
        return ranking_margin(content)

    def _serve(self, current: Pass) -> None:
        """Answer all HOST descriptors of a pass; the first one waits."""
        self.current = current
        work = self._vector_work(current)
        for index in range(self._layout.host_turns(current.kind)):
            if index:
                self._control.wait()
            argument = self._control.registers["HOST_ARGUMENT"]
            if argument != host_argument(current.kind, index):
                self._control.check_state("HOST")
                raise OSError(
                    f"accelerator: HOST descriptor {argument:#x}; expected "
                    f"{host_argument(current.kind, index):#x}"
                )
            self._observe(current, index)
            next(work)
            self._control.answer("CONTINUE")

    def _vector_work(self, current: Pass) -> Iterator[None]:
        """All work of a pass for the host, which pauses wherever the array is to go on."""
        c = self._model.config
        positions = torch.tensor(current.depths) + current.start
        tables = [(cosine[positions], sine[positions]) for cosine, sine in self._tables]
        masks = attention_masks(c, current, self._layout.sharing)
        schedule = self._layout.schedule(current.kind)
        steps = pass_steps(self._model, schedule, torch.tensor(current.tokens), tables)
        answer = None
        entries: tuple[torch.Tensor, ...] = ()  # the new keys and values of the block
        while (request := _next_request(steps, answer)) is not None:
            match request:
                case LinearRequest(names, x):
                    self._write_operands(current.kind, names, x)
                    self._operands = (x,)
                    yield
                    places = zip(names, self._layout.results_of(names), strict=True)
                    answer = [
                        read_results(self._board, self._layout, *place, len(x)) for place in places
                    ]
                case StoreRequest(block, keys, values):
                    answer = self._kv.store(block, current.start, keys, values)
                    entries = keys, values
                case AttentionRequest(block, queries):
                    allowed = masks[not c.is_global(block)]
                    answer = yield from self._attend(queries, entries, allowed)
        if current.kind is PassKind.SINGLE:
            # The last block's entries have been in no product yet.
            for part, tensor in zip(("scores", "values"), entries, strict=True):
                row = first_nonfinite_row(tensor)
                if row is not None:
                    raise current.nonfinite(f"block.{c.blocks - 1}.{part}", row)
        yield  # what lies behind the last stage is done

    def _write_operands(self, kind: PassKind, names: Sequence[str], x: torch.Tensor) -> None:
        """Provide the input of linear layers in all forms that their modes need."""
        modes = {self._layout.weights[name].mode(kind) for name in names}
        if Mode.DRAFT in modes:
            block = quantize_activations(x, self._config.engine.format.group)
            words = draft_activation_words(block, self._config)
            self._board.write(self._layout.draft_activations, words)
        exact_too = kind is PassKind.DRAFT and "head" in names and self.reranked
        if modes != {Mode.DRAFT} or exact_too:
            words = activation_words(x.numpy().view(np.uint16), self._config)
            self._board.write(self._layout.activations, words)

    def _attend(
        self, queries: torch.Tensor, entries: tuple[torch.Tensor, ...], allowed: torch.Tensor
    ) -> Generator[None, None, torch.Tensor]:
        """Attention of a block, float16 [T, heads * D], all KV heads at once; `entries` are the
        keys and values of the pass."""
        c, layout = self._model.config, self._layout
        rows, (keys, values) = len(queries), entries
        # Query heads of one KV head are rows of one product.
        q = queries.unflatten(1, (c.kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        steps = attention_steps(q, allowed, c.attention_scale)
        self._write_attention(next(steps), layout.attention_stride(c.head_dim))
        self._operands = queries, keys
        yield
        stride = layout.attention_result_stride(layout.capacity)
        scores = self._read_attention(q.shape[1], allowed.shape[1], stride)
        self._write_attention(steps.send(scores), layout.attention_stride(layout.capacity))
        self._operands = (values,)
        yield
        stride = layout.attention_result_stride(c.head_dim)
        y = self._read_attention(q.shape[1], c.head_dim, stride)
        y = finish(steps, y)  # [kv_heads, T * sharing, D]
        return y.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1)

    def _write_attention(self, x: torch.Tensor, stride: int) -> None:
        """Provide activations float16 [kv_heads, N, K] of attention products."""
        words = activation_words(x.contiguous().numpy().view(np.uint16), self._config)
        for head, content in enumerate(words):
            self._board.write(self._layout.activations + head * stride, content)

    def _read_attention(self, n: int, o: int, stride: int) -> torch.Tensor:
        """Results float32 [kv_heads, n, o] of attention products."""
        engine = self._config.engine
        size = results_bytes(n, o, engine.cols)
        heads = [
            unpack_batches(
                self._board.read(self._layout.results + head * stride, size),
                *(n, o, engine.cols, engine.rows),
            )
            for head in range(self._model.config.kv_heads)
        ]
        return torch.from_numpy(np.stack(heads))


def _next_request(
    steps: PassSteps, answer: list[torch.Tensor] | torch.Tensor | None
) -> Request | None:
    """The next request of a pass, None behind the last one."""
    try:
        return steps.send(answer)
    except StopIteration:
        return None


def attention_masks(
    config: ModelConfig, current: Pass, sharing: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which KV entries each row may attend to, globally and with the sliding window, bool
    [T * sharing, S]: each row as often as query heads share a KV head."""
    mask = pass_mask(current.start, current.parents)
    window = mask
    if config.sliding_window is not None:
        positions = torch.tensor(current.depths) + current.start
        of_entries = torch.cat((torch.arange(current.start), positions))
        window = mask & (positions[:, None] - of_entries < config.sliding_window)
    return mask.repeat_interleave(sharing, dim=0), window.repeat_interleave(sharing, dim=0)
