# SPDX-License-Identifier: Apache-2.0
"""Configurations of the accelerator, and how fast each decodes a model from memory of a bandwidth.

Cycles are those of `speq.model.prediction`. The array takes 16 bits per column and cycle from the
weights' port; where the port is narrower or the memory slower, it waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from speq.host.cycles import predicted_passes
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.checkpoint import ModelConfig
from speq.model.cycles import Formats
from speq.model.pareto import pareto_front
from speq.model.prediction import predict

#: Smallest width of a port, and AXI4's largest.
_NARROWEST, _WIDEST = 64, 1024
_WEIGHT_BITS = 16


@dataclass(frozen=True)
class Configuration:
    """What is varied: rows, columns, lanes, and bits of the ports of weights and of data."""

    rows: int
    cols: int
    lanes: int
    weights_bits: int
    data_bits: int

    @property
    def name(self) -> str:
        """All of it in short."""
        array = f"{self.rows}x{self.cols}"
        return f"{array}, {self.lanes} lanes, ports {self.weights_bits}/{self.data_bits}"

    def accelerator(self) -> AcceleratorConfig:
        """With everything else as it usually is. Raises ValueError if there is no such one."""
        return AcceleratorConfig(
            EngineConfig(self.rows, self.cols),
            AxiConfig(data_bits=self.weights_bits),
            AxiConfig(data_bits=self.data_bits),
            lanes=self.lanes,
        )


def configurations(
    rows: Iterable[int], cols: Iterable[int], lanes: Iterable[int]
) -> list[Configuration]:
    """All that there are of these, each with ports as wide as the array's words and half as wide.

    Lanes are at most as many as columns, and rows too: other combinations do not exist.

    Raises
    ------
    ValueError
        If a value has no accelerator at all, or none is left.
    """
    rows, cols, lanes = (sorted(set(values)) for values in (rows, cols, lanes))
    for r in rows:
        EngineConfig(rows=r)
    for c in cols:
        AcceleratorConfig(EngineConfig(rows=1, cols=c), lanes=0)
    found = []
    for r, c, e in product(rows, cols, lanes):
        if r > c or e > c:
            continue
        widths = sorted({min(max(c * _WEIGHT_BITS // i, _NARROWEST), _WIDEST) for i in (1, 2)})
        for weights, data in product(widths, widths):
            found.append(Configuration(r, c, e, weights, data))
            found[-1].accelerator()
    if not found:
        raise ValueError("no configuration is left: rows and lanes are at most the columns")
    return found


@dataclass(frozen=True)
class Decoding:
    """What is decoded, and from which memory.

    Attributes
    ----------
    model : ModelConfig
    formats : of the drafted layers by name
    drafted_outputs, reranked : as of `predicted_passes` and `predict`
    acceptance : float
        Share of the drafted tokens that is taken to be accepted.
    context : int
        Positions before a pass.
    clock : float
        MHz.
    bandwidth : float
        GB/s that memory gives the weights' port.
    latency : int
        Of memory, in cycles.
    """

    model: ModelConfig
    formats: Formats
    drafted_outputs: int | None
    reranked: int
    acceptance: float
    context: int
    clock: float
    bandwidth: float
    latency: int

    @property
    def longest(self) -> int:
        """Inputs of the longest product."""
        m = self.model
        return max(m.hidden, m.ffn_hidden, m.heads * m.head_dim, self.context)


@dataclass(frozen=True)
class Speed:
    """How fast a configuration decodes.

    Attributes
    ----------
    length : int
        Of drafts.
    plain, speculative : float
        Tokens per second.
    bandwidth : float
        GB/s of weights that it can take: those of memory, or of port or array if these take less.
    """

    length: int
    plain: float
    speculative: float
    bandwidth: float


def speed(task: tuple[Decoding, Configuration]) -> Speed:
    """The speed of a configuration, with drafts of the length that is the fastest.

    Raises ValueError if no accelerator is made for the model.
    """
    decoding, configuration = task
    accelerator = configuration.accelerator()
    given = decoding.bandwidth * 8000 / decoding.clock  # bits in a cycle
    passes = predicted_passes(
        *(decoding.model, decoding.formats),
        rows=configuration.rows,
        cols=configuration.cols,
        lanes=configuration.lanes,
        latency=decoding.latency,
        context=decoding.context,
        drafted_outputs=decoding.drafted_outputs,
        weight_bits=given,
        weights=accelerator.weights,
        data=accelerator.data,
    )
    p = predict(passes, decoding.acceptance, decoding.context, decoding.reranked)
    rate = decoding.clock * 1e6
    taken = min(given, configuration.weights_bits) * decoding.clock / 8000
    return Speed(p.length, rate / p.plain, rate / p.cycles_per_token, taken)


@dataclass(frozen=True)
class Point:
    """A configuration, what it takes (the less the better), its speed, and whether no other is as
    good in everything and better in something."""

    configuration: Configuration
    size: float
    speed: Speed
    front: bool = False

    @property
    def goodness(self) -> tuple[float, float, float]:
        """Tokens per second, size, and tokens/s for each GB/s, the larger the better."""
        s = self.speed
        return s.speculative, -self.size, s.speculative / s.bandwidth

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            **asdict(self.configuration),
            "size": self.size,
            **asdict(self.speed),
            "per_bandwidth": self.goodness[2],
            "front": self.front,
        }


def mark_front(points: Sequence[Point]) -> list[Point]:
    """The same points, with those of the front marked; of some that are as good in everything the
    first."""
    front = {points[i].goodness: i for i in reversed(pareto_front([p.goodness for p in points]))}
    return [replace(point, front=i in front.values()) for i, point in enumerate(points)]
