# SPDX-License-Identifier: Apache-2.0
"""The accelerator's driver: lays a model out in memory, starts runs and does the vector work.

The array multiplies, the speculation loop is in hardware; everything between the products, that is
norms, rotary embedding, softmax and activations, is done here with the golden model's operations
(`pass_steps` and `attention_steps` of `speq.model.transformer`), whenever a HOST descriptor asks
for it. So all bits are the golden model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from speq.host.board import Board
from speq.host.checks import check_capacity, check_settings
from speq.host.image import Image, model_image
from speq.host.kv_entries import KVEntries
from speq.host.layout import (
    RING_LOG2,
    Region,
    activation_words,
    draft_activation_words,
    host_argument,
    ranking_bytes,
    results_bytes,
    unpack_batches,
    unpack_results,
)
from speq.host.registers import (
    ALL_INTERRUPTS,
    Registers,
    read_configuration,
    speculation_words,
)
from speq.hw.accelerator_config import ErrorCode, PassKind
from speq.hw.control.register_map import (
    ANSWERS,
    COUNTERS,
    ERRORS,
    STATES,
)
from speq.hw.engine_config import Mode
from speq.model.arith import quantize_activations
from speq.model.checkpoint import Model, ModelConfig
from speq.model.draft_tree import Origin, Proposal
from speq.model.format import EncodedTensor
from speq.model.settings import Sampling, Settings
from speq.model.speculation import (
    Step,
    committed_step,
    pass_mask,
    shared_prefix,
    token_limit,
)
from speq.model.transformer import (
    AttentionRequest,
    LinearRequest,
    NonFiniteError,
    PassSteps,
    Request,
    StoreRequest,
    attention_steps,
    finish,
    first_nonfinite_row,
    pass_steps,
    rotary_tables,
)

#: What a `NonFiniteError` calls passes.
_PASS_NAMES = {PassKind.SINGLE: "prompt", PassKind.DRAFT: "draft", PassKind.VERIFY: "verify"}
#: Times that STATUS is read before an accelerator counts as unable to stop.
_STOP_READS = 100_000


class AcceleratorError(OSError):
    """A run has ended with an error.

    Attributes
    ----------
    code : ErrorCode
    address : int
        Of the culprit, as the register ERROR_ADDRESS explains it.
    """

    def __init__(self, code: ErrorCode, address: int) -> None:
        super().__init__(f"accelerator: {code.name} at {address:#x}: {ERRORS[code]}")
        self.code, self.address = code, address


@dataclass(frozen=True)
class Pass:
    """A walk through a program: rows' tokens, and KV entries before them; of a verify pass also the
    row that each follows, and where its token is from. By default rows follow each other."""

    kind: PassKind
    tokens: list[int]
    start: int
    parents: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        if not self.parents:
            object.__setattr__(self, "parents", [max(0, row - 1) for row in range(rows)])
            object.__setattr__(self, "origins", [Origin.CHAIN] * rows)

    @property
    def proposal(self) -> Proposal:
        """All rows but the first."""
        return Proposal(self.tokens[1:], self.parents[1:], self.origins[1:])

    @property
    def depths(self) -> list[int]:
        """Each row's distance from the first."""
        return self.proposal.depths


_NO_PASS = Pass(PassKind.SINGLE, [], 0)


class Driver:
    """A model on an accelerator: decodes like `speq.model.speculation.generate`.

    One run at a time. All memory in `memory` belongs to it.

    Parameters
    ----------
    board : Board
    model : Model
    encoded : encoded linear layers by name
        In the format of the accelerator, with any number of columns; other layers are taken as
        plain FP16, in draft passes too. Without any, there is no drafting.
    capacity : int, optional
        Entries of the KV cache; `default_capacity` when not given.
    memory : Region, optional
        What it may use of the board's memory; from 0 on when not given.
    image : Image, optional
        What to load, in place of `encoded` and `capacity`.
    patience : int, optional
        Cycles without an interrupt after which the accelerator counts as hanging.

    Attributes
    ----------
    observer : callable, optional
        Called with the pass and the number of the HOST descriptor whenever one is about to be
        served.
    verify_logits : torch.float32 [rows, vocabulary], optional
        Of all rows of the last step's verify pass, refused ones included.

    Raises
    ------
    ValueError
        If the model does not fit the accelerator, or the encoding is not one that it can read or
        does not decode to the model's weights bit for bit; if the image is not of this model or
        for this accelerator. Before anything of an image is written.
    """

    def __init__(
        self,
        board: Board,
        model: Model,
        encoded: Mapping[str, EncodedTensor] | None = None,
        *,
        capacity: int | None = None,
        memory: Region | None = None,
        image: Image | None = None,
        patience: int | None = None,
    ) -> None:
        self._board, self._model, self._patience = board, model, patience
        self.observer: Callable[[Pass, int], None] | None = None
        self.verify_logits: torch.Tensor | None = None
        self.config = config = read_configuration(board)
        self.registers = Registers(board, config)
        if image is None:
            image = model_image(config, model, encoded, capacity=capacity)
        elif encoded is not None or capacity is not None:
            raise ValueError("an image says what is encoded and how many entries the KV cache has")
        else:
            image.check_board(board)
            image.check_model(model)
        start, stop = memory or Region(0, 1 << config.address_bits)
        self.layout = layout = image.layout(model.config, start)
        if start + layout.size > stop:
            raise ValueError(f"the model needs {layout.size} bytes of memory, not {stop - start}")
        self._drafts = bool(image.encoded_names)
        self._capacity = image.capacity
        self._tables = rotary_tables(model, torch.arange(image.capacity))
        self._kv = KVEntries(board, layout)
        self._text: list[int] = []  # whose entries are the first ones in it
        self._reranked = image.reranked  # in the program of draft passes
        self._margins: list[float] = []
        self._current = _NO_PASS
        self._operands: tuple[torch.Tensor, ...] = ()  # [T, ...], of the stage under way
        self._stop()
        image.load(board, start)
        image.write_registers(board, start)

    # Setting up.

    def _write_draft_program(self, reranked: int) -> None:
        """The one that re-ranks so many tokens."""
        self._reranked = reranked
        program = self.layout.program_content(PassKind.DRAFT, reranked)
        self._board.write(self.layout.programs[PassKind.DRAFT], program)
        # Of the longest program, so that what is fetched ahead in it ends with it.
        self.registers["PROGRAM_LENGTH"] = self.layout.longest_program(reranked)

    def counters(self) -> dict[str, int]:
        """All performance counters; between runs, or while the accelerator waits for the host."""
        return {name: self.registers[name] for name in COUNTERS}

    def reranked_tiles(self) -> int:
        """Tiles of the head that the last draft pass has computed exactly."""
        if not (self._reranked and self.layout.weights["head"].encoded):
            return 0
        ranking = self._board.read(self.layout.ranking, ranking_bytes(self.config)).view("<u4")
        candidates = min(self._reranked, self.layout.weights["head"].drafted)
        return len(set(ranking[0 : 2 * candidates : 2] // self.config.engine.cols))

    # Decoding.

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        settings: Settings | None = None,
        stop_ids: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        seed: int = 0,
        resume: bool = False,
    ) -> Generator[Step, None, None]:
        """Decode behind `prompt` and yield every committed step.

        A run that ends with NONFINITE in a pass that plain decoding would not make is followed by
        another, which repeats the step as `speq.model.speculation.generate` does.

        When the prompt but its last token is in the KV cache, the counters start at 0.

        Parameters
        ----------
        prompt : one or more token ids
        max_tokens : int
            Ends after this many tokens, and where the model's context ends.
        settings : Settings, optional
            Its rows must be the accelerator's; a draft length of 0 decodes plainly.
        stop_ids : token ids after which decoding ends
        sampling : Sampling, optional
            Greedy decoding when not given. Only what `Sampling.check_accelerated` allows.
        seed : int
            Of sampling, 64 bits.
        resume : bool
            Take what the KV cache holds of the prompt's beginning from earlier runs.

        Raises
        ------
        ValueError
            If the prompt is empty or too long, or the settings are not possible here.
        NonFiniteError
            If the prompt, or the pass of the last committed token alone, has a result that is not
            finite.
        AcceleratorError
            If a run ends with another error.
        """
        rows = self.config.engine.rows
        settings = settings or Settings(rows)
        check_settings(self.config, settings)
        if sampling is not None:
            sampling.check_accelerated()
        limit = token_limit(self._model, prompt, max_tokens)
        check_capacity(self._capacity, len(prompt), limit, rows)
        if limit < 1:
            return
        known = self.known(prompt) if resume else 0
        del self._text[known:]
        try:
            self._prefill(prompt[known:-1], known)
            self._text += prompt[known:-1]
            self.registers.command("clear_counters")
            self._write_sampling(sampling, seed)
            yield from self._decode(prompt, limit, settings, stop_ids)
        except BaseException:
            self._abort()
            raise

    def known(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's tokens, of which the last is never one, a run that resumes finds
        in the KV cache."""
        return shared_prefix(self._text, prompt[:-1])

    def _prefill(self, tokens: Sequence[int], start: int) -> None:
        """Fill the KV cache from entry `start` on."""
        self.registers["RUN"] = 0
        rows = self.config.engine.rows
        for i in range(0, len(tokens), rows):
            self._fill(list(tokens[i : i + rows]), start + i)

    def _fill(self, tokens: list[int], start: int) -> None:
        """A pass that fills the KV cache from entry `start` on."""
        self.registers["PASS_ROWS"] = len(tokens)
        self.registers["POSITION"] = start
        self._start()
        try:
            self._expect("HOST")
            self._serve(Pass(PassKind.SINGLE, tokens, start))
            self._expect("IDLE")
        except NonFiniteError as error:
            # A row before it may fail in a later product.
            if error.position > start:
                self._stop()
                self._fill(tokens[: error.position - start], start)
            raise

    def _decode(
        self, prompt: Sequence[int], limit: int, settings: Settings, stop_ids: frozenset[int]
    ) -> Generator[Step, None, None]:
        r = self.registers
        r["POSITION"] = len(prompt) - 1
        r["ROOT"] = root = prompt[-1]
        self._write_settings(settings, prompt)
        if settings.reranked != self._reranked:
            self._write_draft_program(settings.reranked)
        longest = length = settings.length if self._drafts else 0
        chain: list[int] = []  # what is left of that of a verify pass that was not finite
        left, number, repeated = limit, 1, False
        written = self._begin(length, left)
        while True:
            try:
                state = self._expect("HOST", "STEP", "IDLE")
                if state == "HOST":
                    self._serve(self._next_pass())
                    continue
            except NonFiniteError as error:
                failed = self._current
                if failed.kind is PassKind.DRAFT:
                    length = failed.start - r["POSITION"]  # the chain ends before it
                elif len(failed.tokens) > 1:
                    length, repeated = 0, True
                    chain = failed.proposal.chain
                else:
                    error.step = number
                    raise
                self._stop()
                written = self._begin(length, left)
                continue
            if state == "IDLE":
                return
            step = self._committed_step(written, stop_ids, repeated)
            self._text += [root, *step.tokens[:-1]]
            root = step.tokens[-1]
            written, left = written + len(step.tokens), left - len(step.tokens)
            number, repeated = number + 1, False
            chain = chain[1:] if chain[:1] == [root] else []
            ended = root in stop_ids
            resumes = left > 0 and not ended and length < longest and not chain
            self._answer("FINISH" if ended or resumes else "CONTINUE")
            yield step
            if resumes:
                self._expect("IDLE")
                length = longest
                written = self._begin(length, left)

    def _write_sampling(self, sampling: Sampling | None, seed: int) -> None:
        """What a run is that decodes."""
        r = self.registers
        r["PROMPT_END"] = r["STOP_TOKENS"] = 0  # prompts and ends of texts are dealt with here
        if sampling is None:
            r["RUN"] = {"speculate": 1, "sample": 0, "truncate": 0, "steps": 1}
        else:
            truncates = sampling.min_p > 0
            r["RUN"] = {"speculate": 1, "sample": 1, "truncate": truncates, "steps": 1}
            r["SCALE"] = int(np.float32(1.0 / sampling.temperature).view(np.uint32))
            r["CUTOFF"] = int(np.float32(sampling.cutoff).view(np.uint32))
            r["SEED"] = seed

    def _write_settings(self, settings: Settings, prompt: Sequence[int]) -> None:
        """How to speculate, and the history if anything is looked for in it."""
        r = self.registers
        for name, value in speculation_words(self.config, settings).items():
            if isinstance(value, tuple):
                r.write_costs(name, value)
            else:
                r[name] = value
        if not self.config.history:
            return
        r["HISTORY_LENGTH"] = 0
        if settings.policy.guesses:
            for token in prompt[-self.config.history :]:
                r["HISTORY"] = token

    def _begin(self, draft_length: int, limit: int) -> int:
        """Start a run that decodes from where the last one has ended; 0, the tokens in the ring."""
        self._current = _NO_PASS
        self.registers["DRAFT_LENGTH"] = draft_length
        self.registers["TOKEN_LIMIT"] = limit
        self._start()
        return 0

    def _committed_step(self, written: int, stop_ids: frozenset[int], repeated: bool) -> Step:
        """The step that the accelerator has just committed, but nothing behind a stop token."""
        fields = self.registers.fields("STEP")
        verified = self._current
        tokens = self._read_ring(written, fields["committed"])
        proposal = replace(verified.proposal, margins=self._margins)
        rows = proposal.path(fields["last_row"])
        for depth, row in enumerate(rows):
            if row != depth:
                # Its place is behind the accepted ones. No later one is there: rows rise.
                self._kv.move(verified.start + row, verified.start + depth)
        self.verify_logits = self._read_results("head", self.layout.results, len(verified.tokens))
        return committed_step(
            tokens,
            rows,
            self.verify_logits,
            proposal,
            stop_ids=stop_ids,
            repeated=repeated,
        )

    def _read_ring(self, start: int, count: int) -> list[int]:
        """Tokens number start .. start + count - 1 of a run."""
        size = 1 << RING_LOG2
        first = start % size
        parts = [(first, min(count, size - first)), (0, max(0, count - (size - first)))]
        return [
            int(token)
            for place, length in parts
            if length
            for token in self._board.read(self.layout.ring + 4 * place, 4 * length).view("<u4")
        ]

    # Talking to the accelerator.

    def _start(self) -> None:
        self.registers["IRQ_STATUS"] = ALL_INTERRUPTS
        self.registers.command("start")

    def _answer(self, name: str) -> None:
        self.registers["HOST_ANSWER"] = ANSWERS[name][0]

    def _wait(self) -> None:
        if not self._board.wait_interrupt(self._patience):
            raise OSError(f"accelerator: no interrupt within {self._patience} cycles")

    def _expect(self, *names: str) -> str:
        """Wait for an interrupt; the state, which must be one of these.

        Raises NonFiniteError or AcceleratorError if the run has ended with an error.
        """
        self._wait()
        return self._check_state(*names)

    def _check_state(self, *names: str) -> str:
        value = self.registers["STATUS"]
        state = next((name for name, (v, _) in STATES.items() if v == value), str(value))
        if state == "ERROR":
            error = AcceleratorError(
                ErrorCode(self.registers["ERROR"]), self.registers["ERROR_ADDRESS"]
            )
            if error.code is ErrorCode.NONFINITE:
                layer = self.layout.product_at(self._current.kind, error.address)
                raise self._nonfinite(layer, first_nonfinite_row(*self._operands)) from error
            raise error
        if state not in names:
            raise OSError(f"accelerator: state {state}; expected {' or '.join(names)}")
        return state

    def _nonfinite(self, layer: str, row: int | None) -> NonFiniteError:
        """The error of a layer in the pass under way. The row is None if all operands but the
        weights are finite: then every row shows it."""
        current = self._current
        position = current.start + current.depths[row or 0]
        return NonFiniteError(_PASS_NAMES[current.kind], layer, position)

    def _abort(self) -> None:
        """Bring the accelerator back to IDLE behind an error, if it answers."""
        with suppress(OSError):  # the first error says more
            self._stop()

    def _stop(self) -> None:
        """Bring the accelerator to IDLE, whatever it was doing. Raises OSError if it stays busy."""
        idle, error = (STATES[name][0] for name in ("IDLE", "ERROR"))
        if self.registers["STATUS"] not in (idle, error):
            self.registers.command("stop")
        for _ in range(_STOP_READS):
            if self.registers["STATUS"] in (idle, error):
                break
        else:
            raise OSError("accelerator: it does not stop, perhaps memory does not answer: reset it")
        if self.registers["STATUS"] == error:
            self.registers.command("stop")

    # Passes.

    def _next_pass(self) -> Pass:
        """The pass of a decoding run whose first HOST descriptor waits."""
        r = self.registers
        fields = r.fields("PASS")
        kind, rows, start = PassKind(fields["kind"]), fields["rows"], r["PASS_POSITION"]
        if kind is PassKind.DRAFT and fields["index"] == 0:
            self._margins = []
        elif self._current.kind is PassKind.DRAFT:
            self._margins.append(self._read_margin())
        else:
            self._margins = []
        tokens = [r.element("ROW_TOKEN", row) for row in range(rows)]
        if kind is PassKind.DRAFT:
            return Pass(kind, tokens, start)
        places = [r.fields("ROW_PLACE", row) for row in range(rows)]
        parents = [place["parent"] for place in places]
        return Pass(kind, tokens, start, parents, [Origin(place["origin"]) for place in places])

    def _read_margin(self) -> float:
        """The logit margin of the draft pass that has just ended."""
        ranking = self._board.read(self.layout.ranking, ranking_bytes(self.config)).view("<f4")
        margin = ranking[1] - ranking[3]
        return math.inf if np.isnan(margin) else float(margin)

    def _serve(self, current: Pass) -> None:
        """Answer all HOST descriptors of a pass; the first one waits."""
        self._current = current
        work = self._vector_work(current)
        for index in range(self.layout.host_turns(current.kind)):
            if index:
                self._wait()
            if self.registers["HOST_ARGUMENT"] != host_argument(current.kind, index):
                self._check_state("HOST")
                raise OSError(
                    f"accelerator: HOST descriptor {self.registers['HOST_ARGUMENT']:#x}; expected "
                    f"{host_argument(current.kind, index):#x}"
                )
            if self.observer is not None:
                self.observer(current, index)
            next(work)
            self._answer("CONTINUE")

    def _vector_work(self, current: Pass) -> Iterator[None]:
        """All work of a pass for the host, which pauses wherever the array is to go on."""
        c = self._model.config
        positions = torch.tensor(current.depths) + current.start
        tables = [(cosine[positions], sine[positions]) for cosine, sine in self._tables]
        masks = attention_masks(c, current, self.layout.sharing)
        schedule = self.layout.schedule(current.kind)
        steps = pass_steps(self._model, schedule, torch.tensor(current.tokens), tables)
        answer = None
        entries: tuple[torch.Tensor, ...] = ()  # the new keys and values of the block
        while (request := _next_request(steps, answer)) is not None:
            match request:
                case LinearRequest(names, x):
                    self._write_operands(current.kind, names, x)
                    self._operands = (x,)
                    yield
                    places = zip(names, self.layout.results_of(names), strict=True)
                    answer = [self._read_results(*place, len(x)) for place in places]
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
                    raise self._nonfinite(f"block.{c.blocks - 1}.{part}", row)
        yield  # what lies behind the last stage is done

    def _write_operands(self, kind: PassKind, names: Sequence[str], x: torch.Tensor) -> None:
        """Provide the input of linear layers in all forms that their modes need."""
        modes = {self.layout.weights[name].mode(kind) for name in names}
        if Mode.DRAFT in modes:
            block = quantize_activations(x, self.config.engine.format.group)
            words = draft_activation_words(block, self.config)
            self._board.write(self.layout.draft_activations, words)
        exact_too = kind is PassKind.DRAFT and "head" in names and self._reranked
        if modes != {Mode.DRAFT} or exact_too:
            words = activation_words(x.numpy().view(np.uint16), self.config)
            self._board.write(self.layout.activations, words)

    def _read_results(self, name: str, address: int, tokens: int) -> torch.Tensor:
        """Results of a linear layer, float32 [tokens, o]."""
        o, cols = self.layout.weights[name].o, self.config.engine.cols
        content = self._board.read(address, results_bytes(tokens, o, cols))
        return torch.from_numpy(unpack_results(content, tokens, o, cols))

    def _attend(
        self, queries: torch.Tensor, entries: tuple[torch.Tensor, ...], allowed: torch.Tensor
    ) -> Generator[None, None, torch.Tensor]:
        """Attention of a block, float16 [T, heads * D], all KV heads at once; `entries` are the
        keys and values of the pass."""
        c, layout = self._model.config, self.layout
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
        words = activation_words(x.contiguous().numpy().view(np.uint16), self.config)
        for head, content in enumerate(words):
            self._board.write(self.layout.activations + head * stride, content)

    def _read_attention(self, n: int, o: int, stride: int) -> torch.Tensor:
        """Results float32 [kv_heads, n, o] of attention products."""
        engine = self.config.engine
        size = results_bytes(n, o, engine.cols)
        heads = [
            unpack_batches(
                self._board.read(self.layout.results + head * stride, size),
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
