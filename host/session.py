# SPDX-License-Identifier: Apache-2.0
"""Decoding sessions: a model and its encoding, decoded by the golden model or on a board."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from speq.host.board import Board
from speq.host.checks import check_encoded, check_model, check_vector_unit
from speq.host.driver import Driver
from speq.host.image import Image
from speq.host.layout import Region, round_up
from speq.host.programs import ModelLayout
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.model.checkpoint import Model
from speq.model.format import EncodedTensor
from speq.model.number_format import FormatConfig
from speq.model.speculation import MAX_SEED, Sampling, Settings, Step, TextCache, generate
from speq.model.transformer import DraftLinear, prepare_draft_linears

# Up to here a longer dot product costs a simulation nothing worth another build: models with less
# share one, and a longer context of others counts as a whole.
_LEAST_MAX_K, _COMMON_MAX_K = 1024, 2048
# Noise for heads of these numbers of inputs: smaller ones are toys', and that for larger ones is
# hardly cheaper.
_LEAST_HEAD_INPUTS, _MOST_HEAD_INPUTS = 64, 512


def kv_capacity(model: Model, prompt: Sequence[int], max_tokens: int, rows: int) -> int:
    """Entries of the KV cache that so many tokens behind a prompt need on an array of `rows`."""
    return min(model.config.context, len(prompt) + max_tokens) + rows


def accelerator_for(
    model: Model,
    encoded: Mapping[str, EncodedTensor],
    rows: int,
    cols: int,
    capacity: int,
    lanes: int | None = None,
) -> AcceleratorConfig:
    """An accelerator for a model with a KV cache of so many entries, noise for a head like its own,
    and a vector unit of so many lanes, as usual when not given.

    Raises
    ------
    ValueError
        If there can be none, or it could not decode the model or read the encoding.
    """
    check_model(model)
    first = next(iter(encoded.values()), None)
    number_format = first.config if first else FormatConfig()
    c = model.config
    # The whole context of small models, so that no length of text needs another simulation.
    whole = min(c.context + rows, _COMMON_MAX_K)
    max_k = max(c.hidden, c.ffn_hidden, c.heads * c.head_dim, capacity, whole, _LEAST_MAX_K)
    engine = EngineConfig(
        rows=rows,
        cols=cols,
        format=number_format,
        # Powers of two, so that one simulation serves prompts of many lengths.
        max_k=1 << (max_k - 1).bit_length(),
    )
    # Heads begin at tiles.
    max_o = max(engine.max_o, c.vocab_size, c.heads * round_up(c.head_dim, cols))
    # The power of two up to which all heads of so many inputs or more have their noise in time.
    head_inputs = 1 << (min(c.hidden, _MOST_HEAD_INPUTS).bit_length() - 1)
    least = max(_LEAST_HEAD_INPUTS, AcceleratorConfig.least_head_inputs(engine))
    config = AcceleratorConfig(
        replace(engine, max_o=max_o), lanes=lanes, head_inputs=max(head_inputs, least)
    )
    check_vector_unit(config)
    if c.heads > config.query_heads:
        config = replace(config, query_heads=1 << (c.heads - 1).bit_length())
    check_encoded(config, encoded)
    return config


def memory_size(
    config: AcceleratorConfig,
    model: Model,
    encoded: Mapping[str, EncodedTensor],
    capacity: int,
    base: int = 0,
) -> int:
    """Bytes of memory, from address `base` on, that a session needs on this accelerator.

    Raises ValueError if the model does not fit the accelerator.
    """
    drafted = encoded["head"].drafted_outputs if "head" in encoded else None
    layout = ModelLayout(config, model.config, encoded, capacity, base, drafted_outputs=drafted)
    return layout.size


class Session:
    """A model and its encoding, decoded on a board, or by the golden model if there is none.

    A context manager; at its end or with `close` the board is closed, which is the session's from
    the start: a session that cannot be set up closes it as well.

    Parameters
    ----------
    model : Model
    encoded : encoded linear layers by name, optional
        Without any, there is no drafting.
    board : Board, optional
        With an accelerator that can read the encoding.
    capacity, memory : int, Region, optional
        Entries of the KV cache on the board, and what the session may use of its memory, as of
        `Driver`.
    image : Image, optional
        What is loaded onto the board, in place of `encoded` and `capacity`; golden decoding takes
        the encoded layers from it.

    Attributes
    ----------
    model, encoded, board

    Raises
    ------
    ValueError
        If the model does not fit the accelerator, or the encoding is not one that it can read or
        does not decode to the model's weights bit for bit. The golden model never reads weights
        from the encoding, and does not compare them. If the image is not of this model or not for
        this accelerator.
    """

    def __init__(
        self,
        model: Model,
        encoded: Mapping[str, EncodedTensor] | None = None,
        board: Board | None = None,
        *,
        capacity: int | None = None,
        memory: Region | None = None,
        image: Image | None = None,
    ) -> None:
        self.model, self.board = model, board
        self._text = TextCache(model.config)
        self._driver: Driver | None = None
        try:
            if board is not None:
                self._driver = Driver(
                    board, model, encoded, capacity=capacity, memory=memory, image=image
                )
            self.encoded = image.encoded(model) if image else encoded or {}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the board, if there is one; it decodes no more from then on."""
        if self.board is not None:
            self.board.close()

    @property
    def driver(self) -> Driver:
        """Of the accelerator. Raises ValueError if there is no board."""
        if self._driver is None:
            raise ValueError("this session decodes with the golden model, without a board")
        return self._driver

    @cached_property
    def draft_linears(self) -> dict[str, DraftLinear] | None:
        """The golden model's draft layers; None if nothing is encoded."""
        return prepare_draft_linears(self.encoded) if self.encoded else None

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        settings: Settings | None = None,
        stop_ids: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        resume: bool = False,
    ) -> Generator[Step, None, None]:
        """Decode behind `prompt`, on the board if there is one: `Driver.generate`, or `golden`,
        which yields the same steps. Of the generator a board takes the seed.

        With `resume`, only those of the prompt's tokens are computed that the KV cache does not
        hold from the run before (see `known`), as in a conversation; the steps are the same.
        """
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "settings": settings,
            "stop_ids": stop_ids,
            "sampling": sampling,
            "resume": resume,
        }
        if self._driver is None:
            return self.golden(prompt, **options, generator=generator)
        if generator is not None:
            options["seed"] = generator.initial_seed() & MAX_SEED
        elif sampling is not None:
            raise ValueError("sampled decoding needs a generator")
        return self._driver.generate(prompt, **options)

    def known(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's first tokens a run of `generate` with `resume` would find in the
        KV cache."""
        return (self._text if self._driver is None else self._driver).known(prompt)

    def golden(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        settings: Settings | None = None,
        stop_ids: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        resume: bool = False,
    ) -> Generator[Step, None, None]:
        """Decode with the golden model, as `speq.model.speculation.generate` does; `resume` as of
        `generate`, but with a KV cache of the golden model's own."""
        return generate(
            self.model,
            prompt,
            self.draft_linears,
            max_tokens=max_tokens,
            settings=settings,
            sampling=sampling,
            generator=generator,
            stop_ids=stop_ids,
            text=self._text if resume else None,
        )
