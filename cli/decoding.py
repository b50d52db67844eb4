# SPDX-License-Identifier: Apache-2.0
"""Decoding for `speq generate`: what is asked for, and a model that is ready to do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speq.cli.decoding_output import Reply
from speq.cli.notes import detail
from speq.cli.options import DEFAULT_THRESHOLD
from speq.cli.progress import with_passing_bar
from speq.cli.simulation import interruptible, simulated_board
from speq.model.number_format import FormatConfig

if TYPE_CHECKING:
    from speq.host.image import Image
    from speq.model.checkpoint import Model
    from speq.model.encoded_file import EncodedModel
    from speq.model.format import EncodedTensor
    from speq.model.speculation import Sampling, Settings, Step
    from speq.sim.simulated_board import SimulatedBoard


class Decoding(StrEnum):
    """How to decode."""

    SPEQ = "speq"
    FP16 = "fp16"


class Sampler(StrEnum):
    """How to sample (`speq.model.settings.SAMPLERS`)."""

    GUMBEL = "gumbel"
    RSD = "rsd"


class Backend(StrEnum):
    """What to decode with."""

    GOLDEN = "golden"
    RTL = "rtl"


@dataclass(frozen=True)
class Request:
    """What is asked for, by options that fit together.

    Attributes
    ----------
    model : str
        Path or alias.
    mode : Decoding
    backend : Backend
    max_tokens, seed : int
    sampling : Sampling, optional
        None for greedy decoding.
    encoded : Path, optional
        File of `speq encode`.
    number_format : FormatConfig
        Of the layers, without such a file.
    cols, lanes : int
        Columns of the simulated array, and lanes of its vector unit, 0 if none is simulated.
    chat : bool
        There are several turns, which may fill the model's context.
    image : Path, optional
        File of `speq image`, which says `cols`, `lanes` and what is encoded.
    """

    model: str
    mode: Decoding
    backend: Backend
    max_tokens: int
    seed: int
    sampling: Sampling | None
    encoded: Path | None
    number_format: FormatConfig
    cols: int
    lanes: int
    chat: bool
    image: Path | None = None

    @property
    def speculative(self) -> bool:
        """Whether anything is drafted."""
        return self.mode is Decoding.SPEQ

    @property
    def rtl(self) -> bool:
        """Whether the RTL decodes."""
        return self.backend is Backend.RTL


def chosen_sampling(
    temperature: float, top_k: int, top_p: float, min_p: float, sampler: Sampler
) -> Sampling | None:
    """How to sample; None for greedy decoding, temperature 0.

    Raises
    ------
    ValueError
        If a value is impossible, or if top-k, top-p or min-p is given for greedy decoding.
    """
    from speq.model.settings import Sampling

    if temperature != 0:
        return Sampling(temperature, top_k, top_p, min_p, str(sampler))
    if top_k != 0 or top_p != 1 or min_p != 0:
        raise ValueError("top-k, top-p and min-p need sampling: give a --temperature above 0")
    return None


def chosen_settings(file: EncodedModel | None, **options: float | None) -> Settings:
    """Settings of speculation: an encoded file's, if it has any, but for what the options say.

    Raises
    ------
    ValueError
        If a value is out of range.
    """
    from speq.model.settings import Settings

    given = {name: value for name, value in options.items() if value is not None}
    base = Settings(threshold=DEFAULT_THRESHOLD)
    if file and "alternates" in file.settings:
        # An alternate needs a row, a shorter chain does not: other rows, their own longest chain.
        base = file.settings["chain" if given.get("choices") == 1 else "alternates"]
        if given.get("rows", base.rows) != base.rows:
            base = replace(base, rows=given["rows"], draft_length=None)
    return replace(base, **given)


def changed(settings: Settings, **options: float | None) -> Settings:
    """Settings but for what the options say. Raises ValueError if a value is out of range."""
    return replace(settings, **{name: v for name, v in options.items() if v is not None})


class Decoder:
    """A model that is ready to decode; a context manager.

    Parameters
    ----------
    request : Request
    model : Model
    file : EncodedModel, optional
        The content of `request.encoded`.
    settings : Settings
    image : Image, optional
        The content of `request.image`.
    prompt : sequence of int
        The first one. It is found to be too long before anything takes long.

    Raises
    ------
    ValueError
        If the request is impossible for this model, prompt or file.
    """

    def __init__(
        self,
        request: Request,
        model: Model,
        file: EncodedModel | None,
        settings: Settings,
        prompt: Sequence[int],
        image: Image | None = None,
    ) -> None:
        from speq.host.checks import check_capacity
        from speq.host.session import Session
        from speq.model.evaluation import encoded_costs
        from speq.model.speculation import token_limit

        self._request, self._settings = request, settings
        limit = token_limit(model, prompt, request.max_tokens)
        if image:
            tensors = image.encoded(model)
            try:
                check_capacity(image.capacity, len(prompt), limit, settings.rows)
            except ValueError as error:
                remedy = "make the image with a larger --context, or give a smaller --max-tokens"
                raise ValueError(f"{image.source}: {error}: {remedy}") from error
        else:
            tensors = encoded_tensors(request, model, file)
        self.costs = (
            encoded_costs(model.config, tensors, settings.reranked).relative if tensors else None
        )
        self._board: SimulatedBoard | None = None
        if image:
            self._board = simulated_board(model, tensors, image.config, image.capacity)
            self._session = Session(model, board=self._board, image=image)
            return
        capacity = None
        if request.rtl:
            self._board, capacity = rtl_board(request, model, tensors, settings.rows, prompt)
        self._session = Session(model, tensors, self._board, capacity=capacity)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session.close()

    def decode(self, prompt: list[int], show: Callable[[str, str | None], None]) -> Reply:
        """Decode behind a prompt, showing the text piece by piece with where it is from.

        A `NonFiniteError` or Ctrl-C end the reply; it says so.

        Raises
        ------
        ValueError
            If the model's context leaves no room for a reply.
        """
        from speq.model.speculation import Statistics
        from speq.model.tokenizer import TextStream
        from speq.model.transformer import NonFiniteError

        session, board, tokenizer = self._session, self._board, self._session.model.tokenizer
        reply = Reply(prompt, session.known(prompt), Statistics(), self.costs)
        stream = TextStream(tokenizer, prompt)
        first = board.cycles() if board else 0
        started = time.perf_counter()
        steps = self._steps(prompt)
        try:
            with interruptible(board) if board else nullcontext():
                for step in steps:
                    texts = [stream.push(token) for token in step.tokens]
                    reply.add(step, texts)
                    for text, origin in zip(texts, step.origins, strict=True):
                        show(text, origin if self._request.speculative else None)
            reply.stop = self._reason(reply)
        except NonFiniteError as error:
            reply.stop, reply.error = "error", error
        except KeyboardInterrupt:
            steps.close()
        reply.seconds = time.perf_counter() - started
        if board:
            reply.cycles = board.cycles() - first
            if reply.steps:
                reply.counters = session.driver.counters()
        show(stream.flush(), None)
        whole = TextStream(tokenizer, prompt)
        reply.text = "".join([*map(whole.push, reply.tokens), whole.flush()])
        return reply

    def _steps(self, prompt: list[int]) -> Generator[Step, None, None]:
        request, session = self._request, self._session
        options: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "settings": self._settings,
            "stop_ids": session.model.tokenizer.stop_ids,
            "resume": True,
        }
        if request.sampling is not None:
            import torch

            options["sampling"] = request.sampling
            options["generator"] = torch.Generator().manual_seed(request.seed)
        return session.generate(prompt, **options)

    def _reason(self, reply: Reply) -> str:
        """Why decoding has come to an end."""
        tokens = reply.tokens
        if tokens and tokens[-1] in self._session.model.tokenizer.stop_ids:
            return "stop token"
        return "max tokens" if len(tokens) >= self._request.max_tokens else "context"

    def conditions(self) -> dict[str, Any]:
        """What is the same for all replies, ready for JSON."""
        request, settings = self._request, self._settings
        array = {"rows": settings.rows, "cols": request.cols, "lanes": request.lanes}
        return {
            "model": request.model,
            "backend": str(request.backend),
            "mode": str(request.mode),
            "settings": {
                **(asdict(settings) if request.speculative else {}),
                "max_tokens": request.max_tokens,
                "sampling": request.sampling and asdict(request.sampling),
                "array": array if request.rtl else None,
                "encoded": request.encoded and str(request.encoded),
                "image": request.image and str(request.image),
            },
            "seed": request.seed,
        }


def encoded_tensors(
    request: Request, model: Model, file: EncodedModel | None
) -> Mapping[str, EncodedTensor]:
    """The model's encoded layers: none for plain decoding, the file's, or made here."""
    from speq.model.encoding import encode_linears, tensors_for

    if not request.speculative:
        return {}
    if file and request.encoded:
        # What the accelerator gets, its driver decodes and compares.
        return tensors_for(model, file, request.encoded, decode=not request.rtl)
    detail(f"encoding with {request.number_format}")
    return encode_linears(model, request.number_format, track=with_passing_bar)


def rtl_board(
    request: Request,
    model: Model,
    encoded: Mapping[str, EncodedTensor],
    rows: int,
    prompt: Sequence[int],
) -> tuple[SimulatedBoard, int]:
    """The simulated RTL of an array of so many rows, and the entries of its KV cache: as many as a
    prompt and its reply need, or for a chat the model's context.

    Raises ValueError, before anything takes long, if that is impossible.
    """
    from speq.host.session import accelerator_for, kv_capacity

    most = model.config.context if request.chat else request.max_tokens
    capacity = kv_capacity(model, prompt, most, rows)
    config = accelerator_for(model, encoded, rows, request.cols, capacity, request.lanes)
    detail(f"accelerator: {config}, {capacity} entries of the KV cache")
    return simulated_board(model, encoded, config, capacity), capacity
