# SPDX-License-Identifier: Apache-2.0
"""Cycles of the passes of a run: counted by the accelerator, and predicted by the cycle model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from speq.host.driver import Driver
from speq.host.passes import Pass
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.model.checkpoint import ModelConfig
from speq.model.cycles import Engine, Formats, draft_pass, prefill_pass, verify_pass
from speq.model.speculation import Step

_RESULT_BITS = 32


@dataclass(frozen=True)
class PassShape:
    """What the cycles of a pass depend on: its kind, its rows, the KV entries before them, and the
    tiles of the head that a draft pass computes exactly; of a verify pass that is measured with the
    draft passes of its step, `drafts` are these tiles of each."""

    kind: PassKind
    rows: int
    position: int
    tiles: int = 0
    drafts: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For users; a verify pass of one row is plain decoding."""
        if self.kind is PassKind.SINGLE:
            return "prefill"
        if self.drafts:
            return "step"
        is_plain = self.kind is PassKind.VERIFY and self.rows == 1
        return "plain" if is_plain else self.kind.name.lower()

    def predicted_cycles(
        self,
        config: ModelConfig,
        engine: Engine,
        formats: Formats,
        drafted_outputs: int | None = None,
    ) -> int:
        """Cycles of such a pass from the analytic model, without the host's; formats and drafted
        outputs are those of `draft_pass`."""
        if self.kind is PassKind.DRAFT:
            return draft_pass(
                config, engine, formats, self.position, drafted_outputs, self.tiles
            ).cycles
        cost = prefill_pass if self.kind is PassKind.SINGLE else verify_pass
        drafting = sum(
            draft_pass(config, engine, formats, self.position + i, drafted_outputs, tiles).cycles
            for i, tiles in enumerate(self.drafts)
        )
        return drafting + cost(config, engine, formats, self.rows, self.position).cycles


@dataclass(frozen=True)
class MeasuredPass:
    """A pass that has ended.

    Attributes
    ----------
    shape : PassShape
    counters : dict
        What each counter of the accelerator has counted in it.
    stages : list of int
        Cycles from each of its HOST descriptors to the next, without the host's and without the
        last stage; none with a vector unit.
    """

    shape: PassShape
    counters: dict[str, int]
    stages: list[int] = field(default_factory=list)

    @property
    def cycles(self) -> int:
        """From its first HOST descriptor to its successor's, without the host's; all of it with a
        vector unit."""
        return busy_cycles(self.counters)


def busy_cycles(counters: Mapping[str, int]) -> int:
    """Cycles in which the accelerator did not wait for the host."""
    return counters["CYCLES"] - counters["HOST_CYCLES"]


class Meter:
    """The counters of each pass of a driver's next run.

    A pass lasts from its first HOST descriptor to that of its successor, or to `stop`. With a
    vector unit nothing tells the passes of a step apart, and they count as one.

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
        self._shape: PassShape | None = None  # of the pass under way
        self._before: dict[str, int] = {}
        self._times: list[int] = []
        driver.observer = self._observe

    def _observe(self, current: Pass, index: int) -> None:
        if self._driver.layout.host_turns(current.kind):
            self._observe_turn(current, index)
            return
        if index:
            shape = PassShape(current.kind, len(current.tokens), current.start)
            if current.kind is PassKind.VERIFY:
                chain = range(len(current.proposal.chain))
                shape = replace(shape, drafts=tuple(map(self._driver.reranked_tiles, chain)))
            self._record(shape, [])
        self._before = self._driver.counters()

    def _observe_turn(self, current: Pass, index: int) -> None:
        if index == 0:
            self.stop()
            self._shape = PassShape(current.kind, len(current.tokens), current.start)
            self._before, self._times = self._driver.counters(), []
        self._times.append(self.cycles())
        # Nothing follows the last turn of a prefill pass; then the counters may start anew.
        last = self._driver.layout.host_turns(current.kind) - 1
        if current.kind is PassKind.SINGLE and index == last:
            self.stop()

    def cycles(self) -> int:
        """Since the counters were last cleared, without the host's."""
        # Both go on while the accelerator waits, so that the difference stands still.
        return busy_cycles(
            {name: self._driver.registers[name] for name in ("CYCLES", "HOST_CYCLES")}
        )

    def stop(self) -> None:
        """The pass under way, if there is one, has ended."""
        if self._shape is None:
            return
        shape, self._shape = self._shape, None
        if shape.kind is PassKind.DRAFT:
            shape = replace(shape, tiles=self._driver.reranked_tiles())
        stages = [end - start for start, end in zip(self._times, self._times[1:], strict=False)]
        self._record(shape, stages)

    def _record(self, shape: PassShape, stages: list[int]) -> None:
        counted = {name: n - self._before[name] for name, n in self._driver.counters().items()}
        self.passes.append(MeasuredPass(shape, counted, stages))
        if self._finished:
            self._finished(self.passes[-1])


def passes_of(
    prompt: Sequence[int], steps: Iterable[Step], rows: int, reranked: int = 0
) -> Iterator[PassShape]:
    """The passes that fill the KV cache with a prompt and make these steps, with the drafts' best
    tokens computed exactly as if each was in a tile of its own."""
    position = len(prompt) - 1
    for start in range(0, position, rows):
        yield PassShape(PassKind.SINGLE, min(rows, position - start), start)
    for step in steps:
        for i in range(step.drafted):
            yield PassShape(PassKind.DRAFT, 1, position + i, reranked)
        yield PassShape(PassKind.VERIFY, step.rows, position)
        position += len(step.tokens)


def cycle_engine(config: AcceleratorConfig, latency: int) -> Engine:
    """What the cycles of an accelerator depend on, with memory of this latency."""
    engine = config.engine
    beats = max(1, _RESULT_BITS * engine.cols // config.data.data_bits)
    return Engine(engine.rows, engine.cols, latency=latency, result_beats=beats)
