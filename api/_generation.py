# SPDX-License-Identifier: Apache-2.0
"""Text from a model: at once, or step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from speq.host.session import Session
from speq.model.checkpoint import Model
from speq.model.encoded_file import EncodedModel
from speq.model.settings import DEFAULT_THRESHOLD, Sampling, Settings
from speq.model.speculation import Statistics, Step, token_limit
from speq.model.tokenizer import TextStream


class Chunk(NamedTuple):
    """What a step adds to a text.

    Attributes
    ----------
    text : str
        The text that its tokens complete; a character whose bytes are in several tokens comes with
        the last of them.
    step : Step
        Its tokens, where they are from (`origins`), the logits they were chosen by, and counts.
    """

    text: str
    step: Step


@dataclass(frozen=True, eq=False)
class Generation:
    """A generated text and how it came about.

    Attributes
    ----------
    prompt : list of int
        Token ids that it continues.
    text : str
        Without the prompt and without special tokens.
    steps : list of Step
        What was committed, step by step.
    statistics : Statistics
        Over all steps: acceptance, tokens per pass, modelled speedup.
    counters : dict or None
        What the accelerator's counters say, the prompt included, by name as in the register map
        (`hw/verilog/registers.md`); None without a board.
    """

    prompt: list[int] = field(repr=False)
    text: str
    steps: list[Step] = field(repr=False)
    statistics: Statistics
    counters: dict[str, int] | None = field(repr=False)

    @property
    def tokens(self) -> list[int]:
        """The token ids of the text, a stop token at the end included."""
        return [token for step in self.steps for token in step.tokens]

    @property
    def origins(self) -> list[str]:
        """Where each token is from: "draft", "alternate", "guess" or "target"."""
        return [origin for step in self.steps for origin in step.origins]


def generate(
    model: Model | Session,
    prompt: str | Sequence[int],
    encoded: EncodedModel | None = None,
    *,
    max_tokens: int = 128,
    settings: Settings | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    raw: bool = False,
    keep_logits: bool = False,
) -> Generation:
    """Generate text.

    Parameters
    ----------
    model : Model or Session
        A session keeps what is prepared once for many texts, and may be of an accelerator
        (`simulated_session`), which gives the same tokens and logits.
    prompt : str or sequence of int
        A message, which is put into the model's chat format; or token ids as they are.
    encoded : EncodedModel, optional
        Of the model (a session has its own): decode speculatively. Otherwise token by token.
        Either way gives the same text.
    max_tokens : int
        Ends after this many tokens, behind a stop token, or where the model's context ends.
    settings : Settings, optional
        Of speculation. By default the best that the optimiser found, if it made the encoding, or
        else those of `speq generate`.
    sampling : Sampling, optional
        Draw tokens from the target's distribution. With the sampler "gumbel", the usual one, the
        text is the same with and without speculation. By default the likeliest token is taken.
    seed : int
        Of sampling, 64 bits.
    raw : bool
        Continue the text of `prompt` as it is, without a chat format.
    keep_logits : bool
        Keep `logits` in the steps, 4 bytes for each token and entry of the vocabulary; without it
        they are empty.

    Returns
    -------
    Generation

    Raises
    ------
    ValueError
        If the prompt is empty or too long, or the options do not fit together.
    NonFiniteError
        If FP16 decoding cannot go on, because a result is not finite.
    OSError
        If an accelerator fails.
    """
    session, ids, chunks = _started(
        model, prompt, encoded, max_tokens, settings, sampling, seed, raw
    )
    texts, steps, statistics = [], [], Statistics()
    for text, step in chunks:
        texts.append(text)
        if not keep_logits:
            step = replace(step, logits=step.logits[:0], verified=step.verified[:0])
        steps.append(step)
        statistics.add(step)
    counters = session.driver.counters() if session.board else None
    return Generation(ids, "".join(texts), steps, statistics, counters)


def stream(
    model: Model | Session,
    prompt: str | Sequence[int],
    encoded: EncodedModel | None = None,
    *,
    max_tokens: int = 128,
    settings: Settings | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    raw: bool = False,
) -> Iterator[Chunk]:
    """Generate text and give every step as soon as it is committed.

    Parameters and errors are those of `generate`; what is wrong with them is said at once, errors
    of decoding behind the steps before them.

    Returns
    -------
    iterator of Chunk
    """
    return _started(model, prompt, encoded, max_tokens, settings, sampling, seed, raw)[2]


def _started(
    model: Model | Session,
    prompt: str | Sequence[int],
    encoded: EncodedModel | None,
    max_tokens: int,
    settings: Settings | None,
    sampling: Sampling | None,
    seed: int,
    raw: bool,
) -> tuple[Session, list[int], Iterator[Chunk]]:
    """The session, the prompt's ids, and the chunks that will follow."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1")
    if isinstance(model, Session):
        session = model
        if encoded is not None:
            raise ValueError("a session has its encoding: leave `encoded` out")
    else:
        session = Session(model, encoded.tensors if encoded else None)
    if session.board is not None and sampling is not None:
        sampling.check_accelerated()
    tokenizer = session.model.tokenizer
    if not isinstance(prompt, str):
        ids = list(prompt)
    else:
        ids = tokenizer.encode(prompt) if raw else tokenizer.encode_chat(prompt)
    limit = token_limit(session.model, ids, max_tokens)
    settings = settings or _default_settings(session, encoded)

    def chunks() -> Iterator[Chunk]:
        text, count = TextStream(tokenizer, ids), 0
        options = {"max_tokens": max_tokens, "settings": settings, "stop_ids": tokenizer.stop_ids}
        if sampling is not None:
            options |= {"sampling": sampling, "generator": torch.Generator().manual_seed(seed)}
        for step in session.generate(ids, **options):
            count += len(step.tokens)
            pieces = [text.push(token) for token in step.tokens]
            if count == limit or step.tokens[-1] in tokenizer.stop_ids:  # the last one
                pieces.append(text.flush())
            yield Chunk("".join(pieces), step)

    return session, ids, chunks()


def _default_settings(session: Session, encoded: EncodedModel | None) -> Settings:
    """An optimised encoding's settings; otherwise the usual ones with as many rows as there are."""
    if encoded is not None and "alternates" in encoded.settings:
        return encoded.settings["alternates"]
    rows = Settings().rows if session.board is None else session.driver.config.engine.rows
    return Settings(rows, threshold=DEFAULT_THRESHOLD)
