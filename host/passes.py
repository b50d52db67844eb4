# SPDX-License-Identifier: Apache-2.0
"""Passes of a run: what they are, and what a driver has to do for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from speq.host.board import Board
from speq.host.layout import MemoryLayout, results_bytes, unpack_results
from speq.host.registers import Registers
from speq.hw.accelerator_config import PassKind
from speq.model.draft_tree import Origin, Proposal
from speq.model.transformer import NonFiniteError

#: What a `NonFiniteError` calls passes.
_PASS_NAMES = {PassKind.SINGLE: "prompt", PassKind.DRAFT: "draft", PassKind.VERIFY: "verify"}


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

    def nonfinite(self, layer: str, row: int | None) -> NonFiniteError:
        """The error of a product in this pass. The row is None if all operands but the weights are
        finite: then every row shows it."""
        position = self.start + self.depths[row or 0]
        return NonFiniteError(_PASS_NAMES[self.kind], layer, position)


NO_PASS = Pass(PassKind.SINGLE, [], 0)

#: What is told of passes (`speq.host.driver.Driver.observer`).
Observe = Callable[[Pass, int], None]


def read_pass(registers: Registers) -> tuple[Pass, int]:
    """The pass that the registers tell, of a run that decodes, and the index of a draft pass in its
    chain."""
    fields = registers.fields("PASS")
    kind, rows, start = PassKind(fields["kind"]), fields["rows"], registers["PASS_POSITION"]
    tokens = [registers.element("ROW_TOKEN", row) for row in range(rows)]
    if kind is PassKind.DRAFT:
        return Pass(kind, tokens, start), fields["index"]
    places = [registers.fields("ROW_PLACE", row) for row in range(rows)]
    parents = [place["parent"] for place in places]
    origins = [Origin(place["origin"]) for place in places]
    return Pass(kind, tokens, start, parents, origins), fields["index"]


def read_results(
    board: Board, layout: MemoryLayout, name: str, address: int, tokens: int
) -> torch.Tensor:
    """Results of a linear layer in memory, float32 [tokens, o]."""
    o, cols = layout.weights[name].o, layout.config.engine.cols
    content = board.read(address, results_bytes(tokens, o, cols))
    return torch.from_numpy(unpack_results(content, tokens, o, cols))


class Passes(ABC):
    """What a driver does for the passes of a run while the accelerator computes.

    Attributes
    ----------
    current : Pass
        Under way, or the last one. Of a run that decodes it is known when `step` has returned or
        raised an error.
    margins : list of float
        Of the draft passes of the last step, as of `Step`.
    reranked : int
        Tokens that the program of draft passes re-ranks.
    """

    current: Pass = NO_PASS
    margins: list[float]
    reranked: int

    @abstractmethod
    def fill(self, current: Pass) -> None:
        """Carry out a single pass, which fills the KV cache and whose registers are set.

        Raises AcceleratorError if the run ends with an error, and NonFiniteError if one of the last
        block's keys and values, which are in no product of the pass, is not finite.
        """

    @abstractmethod
    def begin(self) -> None:
        """A run that decodes is about to start."""

    @abstractmethod
    def step(self) -> str:
        """The state, STEP or IDLE, in which a run that decodes has committed a step or ended.

        Raises AcceleratorError if it has ended with an error.
        """

    @abstractmethod
    def nonfinite_row(self, product: str) -> int | None:
        """The lowest row of the pass of which an operand of this product, with a result that is not
        finite, is not; None if all operands but the weights are finite."""

    @abstractmethod
    def accept(self, start: int, rows: Sequence[int]) -> None:
        """Move the entries of the accepted rows of a verify pass behind `start` entries of the KV
        cache to the places behind these, unless the accelerator has done so."""
