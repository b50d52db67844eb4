# SPDX-License-Identifier: Apache-2.0
"""Cycles of the passes of a run: counted by the accelerator, and predicted by the cycle model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from speq.host.driver import Driver
from speq.host.passes import Pass
from speq.hw.accelerator_config import PassKind
from speq.model.pass_cycles import PassCycles
from speq.model.speculation import Step


@dataclass(frozen=True)
class PassShape:
    """What the cycles of a pass depend on: its kind, its rows, the KV entries before them, and the
    tiles of the head that a draft pass computes exactly; of a verify pass that is measured with the
    draft passes of its step, `drafts` are these tiles of each, and `prompt` are the entries that
    the passes over the prompt have filled in the same time."""

    kind: PassKind
    rows: int
    position: int
    tiles: int = 0
    drafts: tuple[int, ...] = ()
    prompt: int = 0

    @property
    def name(self) -> str:
        """For users; a verify pass of one row is plain decoding."""
        if self.kind is PassKind.SINGLE:
            return "prefill"
        if self.prompt:
            return "first step"
        if self.drafts:
            return "step"
        is_plain = self.kind is PassKind.VERIFY and self.rows == 1
        return "plain" if is_plain else self.kind.name.lower()

    def predicted_cycles(self, passes: PassCycles) -> int:
        """Cycles of such a pass, or of all that it is measured with, by the model."""
        if self.kind is PassKind.DRAFT:
            return passes.draft(self.position, self.tiles)
        if self.kind is PassKind.SINGLE:
            return passes.prefill(self.rows, self.position)
        start = self.position - self.prompt
        filling = sum(
            passes.prefill(rows, first) for rows, first in batches(self.prompt, start, passes.rows)
        )
        drafting = sum(
            passes.draft(self.position + i, tiles) for i, tiles in enumerate(self.drafts)
        )
        return filling + drafting + passes.verify(self.rows, self.position)


@dataclass(frozen=True)
class MeasuredPass:
    """A pass that has ended.

    Attributes
    ----------
    shape : PassShape
    counters : dict
        What each counter of the accelerator has counted in it.
    """

    shape: PassShape
    counters: dict[str, int]

    @property
    def cycles(self) -> int:
        """All of them, but for those of waiting for the host behind a step."""
        return busy_cycles(self.counters)


def busy_cycles(counters: Mapping[str, int]) -> int:
    """Cycles in which the accelerator did not wait for the host."""
    return counters["CYCLES"] - counters["HOST_CYCLES"]


class Meter:
    """The counters of each step of a driver's next run.

    Nothing tells the passes of a step apart: they count as one, that of the first step with the
    passes over the prompt.

    Parameters
    ----------
    driver : Driver
        Tells this about its passes.
    finished : callable, optional
        Called with each pass that has ended.

    Attributes
    ----------
    passes : list of MeasuredPass
    """

    def __init__(
        self, driver: Driver, finished: Callable[[MeasuredPass], None] | None = None
    ) -> None:
        self.passes: list[MeasuredPass] = []
        self._driver, self._finished = driver, finished
        self._before: dict[str, int] = {}
        driver.observer = self._observe

    def _observe(self, verified: Pass | None, prompt: int) -> None:
        if verified is not None:
            chain = range(len(verified.proposal.chain))
            self._record(
                PassShape(
                    PassKind.VERIFY,
                    len(verified.tokens),
                    verified.start,
                    drafts=tuple(map(self._driver.reranked_tiles, chain)),
                    prompt=prompt,
                )
            )
        self._before = self._driver.counters()

    def cycles(self) -> int:
        """Since the counters were last cleared, without the host's."""
        # Both go on while the accelerator waits, so that the difference stands still.
        return busy_cycles(
            {name: self._driver.registers[name] for name in ("CYCLES", "HOST_CYCLES")}
        )

    def _record(self, shape: PassShape) -> None:
        counted = {name: n - self._before[name] for name, n in self._driver.counters().items()}
        self.passes.append(MeasuredPass(shape, counted))
        if self._finished:
            self._finished(self.passes[-1])


def passes_of(
    prompt: Sequence[int], steps: Iterable[Step], rows: int, reranked: int = 0
) -> Iterator[PassShape]:
    """The passes that fill the KV cache with a prompt and make these steps, with the drafts' best
    tokens computed exactly as if each was in a tile of its own."""
    position = len(prompt) - 1
    for count, start in batches(position, 0, rows):
        yield PassShape(PassKind.SINGLE, count, start)
    for step in steps:
        for i in range(step.drafted):
            yield PassShape(PassKind.DRAFT, 1, position + i, reranked)
        yield PassShape(PassKind.VERIFY, step.rows, position)
        position += len(step.tokens)


def batches(entries: int, start: int, rows: int) -> Iterator[tuple[int, int]]:
    """The passes that fill so many entries of the KV cache from `start` on: rows and position."""
    for first in range(start, start + entries, rows):
        yield min(rows, start + entries - first), first
