# SPDX-License-Identifier: Apache-2.0
"""The accelerator's driver: lays a model out in memory and starts runs.

The array multiplies, the vector unit does what lies between the products, and the speculation loop
is in hardware: the driver gives a run its tokens and takes those that it commits. Without a vector
unit it serves HOST descriptors as well (`speq.host.host_passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from speq.host.board import Board
from speq.host.checks import check_capacity, check_settings
from speq.host.image import Image, model_image
from speq.host.layout import RING_LOG2, Region, ranking_bytes
from speq.host.layouts import driver_passes
from speq.host.passes import Pass, read_results
from speq.host.registers import read_configuration, speculation_words
from speq.host.run_control import AcceleratorError, RunControl
from speq.hw.accelerator_config import ErrorCode, PassKind
from speq.hw.control.register_map import COUNTERS
from speq.model.checkpoint import Model
from speq.model.format import EncodedTensor
from speq.model.settings import Sampling, Settings
from speq.model.speculation import Step, committed_step, shared_prefix, token_limit
from speq.model.transformer import NonFiniteError

_T = TypeVar("_T")


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
        served. With a vector unit, before each pass over the prompt and each run that decodes,
        whose pass has no rows then, with 0; and with 1 behind each pass over the prompt and, with
        its verify pass, each step.
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
        self._board, self._model = board, model
        self.observer: Callable[[Pass, int], None] | None = None
        self.verify_logits: torch.Tensor | None = None
        self.config = config = read_configuration(board)
        self._control = RunControl(board, config, patience)
        self.registers = self._control.registers
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
        self._passes = driver_passes(
            board, self._control, layout, model, image.capacity, self._observe
        )
        self._text: list[int] = []  # whose entries are the first ones in it
        self._passes.reranked = image.reranked
        self._control.stop()
        image.load(board, start)
        image.write_registers(board, start)

    # Setting up.

    def _write_draft_program(self, reranked: int) -> None:
        """The one that re-ranks so many tokens."""
        self._passes.reranked = reranked
        program = self.layout.program_content(PassKind.DRAFT, reranked)
        self._board.write(self.layout.programs[PassKind.DRAFT], program)
        # Of the longest program, so that what is fetched ahead in it ends with it.
        self.registers["PROGRAM_LENGTH"] = self.layout.longest_program(reranked)

    def counters(self) -> dict[str, int]:
        """All performance counters; between runs, or while the accelerator waits for the host."""
        return {name: self.registers[name] for name in COUNTERS}

    def reranked_tiles(self, index: int = 0) -> int:
        """Tiles of the head that the last draft pass has computed exactly; with a vector unit that
        of this number in the chain of the last step."""
        if not (self._passes.reranked and self.layout.weights["head"].encoded):
            return 0
        address = self.layout.draft_ranking(index)
        ranking = self._board.read(address, ranking_bytes(self.config)).view("<u4")
        candidates = min(self._passes.reranked, self.layout.weights["head"].drafted)
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
            self._control.abort()
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
        current = Pass(PassKind.SINGLE, tokens, start)
        try:
            self._finished(lambda: self._passes.fill(current))
        except NonFiniteError as error:
            # A row before it may fail in a later product.
            if error.position > start:
                self._control.stop()
                self._fill(tokens[: error.position - start], start)
            raise

    def _decode(
        self, prompt: Sequence[int], limit: int, settings: Settings, stop_ids: frozenset[int]
    ) -> Generator[Step, None, None]:
        r = self.registers
        r["POSITION"] = len(prompt) - 1
        r["ROOT"] = root = prompt[-1]
        self._write_settings(settings, prompt)
        if settings.reranked != self._passes.reranked:
            self._write_draft_program(settings.reranked)
        longest = length = settings.length if self._drafts else 0
        chain: list[int] = []  # what is left of that of a verify pass that was not finite
        left, number, repeated = limit, 1, False
        written = self._begin(length, left)
        while True:
            try:
                state = self._finished(self._passes.step)
            except NonFiniteError as error:
                failed = self._passes.current
                if failed.kind is PassKind.DRAFT:
                    length = failed.start - r["POSITION"]  # the chain ends before it
                elif len(failed.tokens) > 1:
                    length, repeated = 0, True
                    chain = failed.proposal.chain
                else:
                    error.step = number
                    raise
                self._control.stop()
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
            self._control.answer("FINISH" if ended or resumes else "CONTINUE")
            yield step
            if resumes:
                self._control.expect("IDLE")
                length = longest
                written = self._begin(length, left)

    def _write_sampling(self, sampling: Sampling | None, seed: int) -> None:
        """What a run is that decodes."""
        r = self.registers
        r["PROMPT_END"] = r["STOP_TOKENS"] = 0  # prompts and ends of texts are dealt with here
        flags = {"speculate": 1, "sample": 0, "truncate": 0, "steps": 1}
        if self.config.lanes:
            flags["move"] = 1
        if sampling is None:
            r["RUN"] = flags
        else:
            r["RUN"] = flags | {"sample": 1, "truncate": sampling.min_p > 0}
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
        self._passes.begin()
        self.registers["DRAFT_LENGTH"] = draft_length
        self.registers["TOKEN_LIMIT"] = limit
        self._control.start()
        return 0

    def _committed_step(self, written: int, stop_ids: frozenset[int], repeated: bool) -> Step:
        """The step that the accelerator has just committed, but nothing behind a stop token."""
        fields = self.registers.fields("STEP")
        verified = self._passes.current
        tokens = self._read_ring(written, fields["committed"])
        proposal = replace(verified.proposal, margins=self._passes.margins)
        rows = proposal.path(fields["last_row"])
        self._passes.accept(verified.start, rows)
        self.verify_logits = read_results(
            self._board, self.layout, "head", self.layout.results, len(verified.tokens)
        )
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

    # Passes.

    def _observe(self, current: Pass, index: int) -> None:
        if self.observer is not None:
            self.observer(current, index)

    def _finished(self, work: Callable[[], _T]) -> _T:
        """What work on passes gives. Raises NonFiniteError instead of an AcceleratorError that says
        that a product has a result that is not finite."""
        try:
            return work()
        except AcceleratorError as error:
            if error.code is not ErrorCode.NONFINITE:
                raise
            current = self._passes.current
            layer = self.layout.product_at(current.kind, error.address)
            raise current.nonfinite(layer, self._passes.nonfinite_row(layer)) from error
