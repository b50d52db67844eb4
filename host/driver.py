# SPDX-License-Identifier: Apache-2.0
"""The accelerator's driver: lays a model out in memory and starts runs.

The array multiplies, the vector unit does what lies between the products, and the speculation loop
is in hardware: the driver gives a run its tokens and takes those that it commits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from speq.host.board import Board
from speq.host.checks import check_capacity, check_settings
from speq.host.image import Image, model_image
from speq.host.layout import RING_LOG2, Region, ranking_bytes
from speq.host.passes import Operands, Pass, read_margins, read_pass, read_results
from speq.host.registers import read_configuration, speculation_words
from speq.host.run_control import AcceleratorError, RunControl
from speq.hw.accelerator_config import ErrorCode, PassKind
from speq.hw.control.register_map import COUNTERS, MAX_STOP_TOKENS
from speq.model.checkpoint import Model
from speq.model.format import EncodedTensor
from speq.model.settings import Sampling, Settings
from speq.model.speculation import Step, committed_step, shared_prefix, token_limit
from speq.model.transformer import NonFiniteError

_TOKEN = 4  # bytes of a token id


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
        Called with None and 0 before each run, and behind each step with its verify pass and the
        number of entries that the run has filled with the prompt before it.
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
        self.observer: Callable[[Pass | None, int], None] | None = None
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
        self._operands = Operands(board, layout)
        self._text: list[int] = []  # whose entries are the first ones in the KV cache
        self._reranked = image.reranked  # tokens, by the program of draft passes
        self._control.stop()
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
        """All performance counters, which begin with the prompt; between runs, or while the
        accelerator waits for the host."""
        return {name: self.registers[name] for name in COUNTERS}

    def reranked_tiles(self, index: int = 0) -> int:
        """Tiles of the head that the draft pass of this number in the chain of the last step has
        computed exactly."""
        if not (self._reranked and self.layout.weights["head"].encoded):
            return 0
        address = self.layout.draft_ranking(index)
        ranking = self._board.read(address, ranking_bytes(self.config)).view("<u4")
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

        The counters start at 0 before the prompt.

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
            self._write_prompt(prompt, known)
            self._write_sampling(sampling, seed)
            self._write_settings(settings, prompt)
            # Where there are more, the host looks for the others behind each step.
            self.registers.write_stop_tokens(sorted(stop_ids)[:MAX_STOP_TOKENS])
            self.registers.command("clear_counters")
            yield from self._decode(prompt, limit, settings, stop_ids)
        except BaseException:
            self._control.abort()
            raise

    def known(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's tokens, of which the last is never one, a run that resumes finds
        in the KV cache."""
        return shared_prefix(self._text, prompt[:-1])

    def _write_prompt(self, prompt: Sequence[int], known: int) -> None:
        """The text of a run, of which so many tokens are in the KV cache."""
        r = self.registers
        if new := prompt[known:-1]:
            self._board.write(self.layout.text + _TOKEN * known, np.array(new, "<u4"))
        r["POSITION"], r["PROMPT_END"], r["ROOT"] = known, len(prompt) - 1, prompt[-1]

    def _decode(
        self, prompt: Sequence[int], limit: int, settings: Settings, stop_ids: frozenset[int]
    ) -> Generator[Step, None, None]:
        r = self.registers
        root, end = prompt[-1], len(prompt) - 1
        if settings.reranked != self._reranked:
            self._write_draft_program(settings.reranked)
        longest = length = settings.length if self._drafts else 0
        chain: list[int] = []  # what is left of that of a verify pass that was not finite
        left, number, repeated = limit, 1, False
        written, unfilled = 0, end - len(self._text)
        self._begin(length, left)
        while True:
            try:
                state = self._control.expect("STEP", "IDLE")
            except AcceleratorError as failure:
                if failure.code is not ErrorCode.NONFINITE:
                    raise
                failed, _ = read_pass(r)
                if unfilled:
                    self._check_prompt(prompt, failed, failure)
                    self._text += prompt[len(self._text) : -1]
                    unfilled = 0
                if failed.kind is PassKind.DRAFT:
                    length = failed.start - r["POSITION"]  # the chain ends before it
                elif len(failed.tokens) > 1:
                    length, repeated = 0, True
                    chain = failed.proposal.chain
                else:
                    layer = self.layout.product_at(failed.kind, failure.address)
                    error = failed.nonfinite(layer, None)
                    error.step = number
                    raise error from failure
                self._control.stop()
                written = 0
                self._begin(length, left)
                continue
            if state == "IDLE":
                return
            verified, _ = read_pass(r)
            if self.observer is not None:
                self.observer(verified, unfilled)
            if unfilled:
                self._text += prompt[len(self._text) : -1]
                unfilled = 0
            step = self._committed_step(verified, written, stop_ids, repeated)
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
                length, written = longest, 0
                self._begin(length, left)

    @contextmanager
    def _without_scratch(self) -> Iterator[None]:
        """For runs of whose passes the host reads operands: all is in memory."""
        r = self.registers
        if self.config.scratch:
            r["SCRATCH"] = 0
        try:
            yield
        finally:
            if self.config.scratch:
                self._control.stop()
                r["SCRATCH"] = self.layout.scratch.start

    def _nonfinite(self, failed: Pass, failure: AcceleratorError) -> NonFiniteError:
        """What a run that ends so says of the product whose result is not finite."""
        layer = self.layout.product_at(failed.kind, failure.address)
        return failed.nonfinite(layer, self._operands.nonfinite_row(failed, layer))

    def _check_prompt(self, prompt: Sequence[int], failed: Pass, failure: AcceleratorError) -> None:
        """Raises the NonFiniteError of the lowest position of the prompt with one, if there is one:
        of a run that has ended in the pass `failed` before its first step."""
        known = len(self._text)
        start = failed.start if failed.kind is PassKind.SINGLE else len(prompt) - 1
        self._check_entries(range(known, start), failure)
        if failed.kind is PassKind.SINGLE:
            with self._without_scratch():
                self._fill(failed.tokens, start, failure)
            raise failure

    def _check_entries(self, places: range, failure: AcceleratorError) -> None:
        """Raises a NonFiniteError if one of the prompt's entries in the last block, which are in no
        product of its passes, is not finite."""
        found = self._operands.nonfinite_entry(places)
        if found is not None:
            raise NonFiniteError("prompt", *found) from failure

    def _fill(self, tokens: list[int], start: int, failure: AcceleratorError) -> None:
        """A single pass once more, over the first of its rows, without scratch memory. Raises as
        `_check_prompt`."""
        if not tokens:
            return
        r = self.registers
        self._control.stop()
        r["RUN"], r["PASS_ROWS"], r["POSITION"] = 0, len(tokens), start
        self._control.start()
        try:
            self._control.expect("IDLE")
        except AcceleratorError as again:
            if again.code is not ErrorCode.NONFINITE:
                raise
            error = self._nonfinite(Pass(PassKind.SINGLE, tokens, start), again)
            # A row before it may fail in a later product.
            self._fill(tokens[: error.position - start], start, failure)
            raise error from failure
        self._check_entries(range(start, start + len(tokens)), failure)

    def _write_sampling(self, sampling: Sampling | None, seed: int) -> None:
        """What a run is that decodes."""
        r = self.registers
        flags = {"speculate": 1, "sample": 0, "truncate": 0, "steps": 1, "move": 1}
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

    def _begin(self, draft_length: int, limit: int) -> None:
        """Start a run that decodes from where the last one has ended."""
        if self.observer is not None:
            self.observer(None, 0)
        self.registers["DRAFT_LENGTH"] = draft_length
        self.registers["TOKEN_LIMIT"] = limit
        self._control.start()

    def _committed_step(
        self, verified: Pass, written: int, stop_ids: frozenset[int], repeated: bool
    ) -> Step:
        """The step that the accelerator has just committed, with this verify pass, behind so many
        tokens of the run."""
        fields = self.registers.fields("STEP")
        tokens = self._read_ring(written, fields["committed"])
        proposal = verified.proposal
        proposal = replace(
            proposal, margins=read_margins(self._board, self.layout, len(proposal.chain))
        )
        rows = proposal.path(fields["last_row"])
        # A row whose token ends the text counts as accepted, but chooses nothing.
        behind = proposal.children(rows[-1])
        rows += [row for row in behind if proposal.tokens[row - 1] == tokens[-1]][:1]
        self.verify_logits = read_results(
            self._board, self.layout, "head", self.layout.logits, len(verified.tokens)
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
        tokens: list[int] = []
        for place, length in ((first, min(count, size - first)), (0, count - (size - first))):
            if length > 0:
                content = self._board.read(self.layout.ring + _TOKEN * place, _TOKEN * length)
                tokens += content.view("<u4").tolist()
        return tokens
