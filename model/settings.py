# SPDX-License-Identifier: Apache-2.0
"""Parameters of speculation and of sampling. They are checked here, without torch, so that wrong
options of a command have their answer at once."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

#: Logit margin below which drafting stops where nothing has chosen a better one.
DEFAULT_THRESHOLD = 2.0
#: No array has so many rows; it bounds what a pass may allocate.
MAX_ROWS = 1 << 10
#: Between these, logits divided by the temperature neither overflow nor vanish.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
#: Most tokens of a draft pass whose logits are computed exactly, as many as the hardware may rank.
MAX_RERANKED = 8
#: No vocabulary is larger.
MAX_TOP_K = 1 << 24
#: Tokens that are searched for repetitions where nothing else is said.
DEFAULT_HISTORY = 2048
MAX_HISTORY = 1 << 16
#: Tokens of a match that make a difference.
LONGEST_MATCH = 4
#: Costs are -log2(probability) in parts of a bit, so many to a bit, and no larger than this.
COST_STEPS, MAX_COST = 16, 255
#: Logit gaps that tables of costs tell apart.
GAP_INDICES = 16
#: The cost of a guess that is never made.
NO_GUESS = MAX_COST
MAX_COST_LIMIT = (1 << 16) - 1


@dataclass(frozen=True)
class Policy:
    """What decides how long drafts are and which rows a verify pass has (`speq.model.draft_tree`).

    The costs of a token, `COST_STEPS` to a bit, are 0 to `MAX_COST`. The defaults know no
    probabilities: they end no chain, prefer alternates with small gaps and guess nothing.

    Attributes
    ----------
    chain_costs : `GAP_INDICES` integers
        That the draft's best token is right, by the logit margin of its pass.
    alternate_costs : `GAP_INDICES` integers
        That another of its tokens is right, by how far its logit is below the best.
    guess_costs : 4 integers
        Of each token that continues a match of 1, 2, 3 and at least 4 tokens; `NO_GUESS`: such a
        match is not continued.
    limit : int
        Drafting stops behind the token with which the chain costs more than this.
    guess_limit : int
        Where the last tokens have a match that costs less than this, and at least three tokens
        behind it, the step has no draft passes.

    Raises
    ------
    ValueError
        If a value is out of range or a table has another length.
    """

    chain_costs: tuple[int, ...] = (0,) * GAP_INDICES
    alternate_costs: tuple[int, ...] = tuple(16 * i for i in range(GAP_INDICES))
    guess_costs: tuple[int, ...] = (NO_GUESS,) * LONGEST_MATCH
    limit: int = MAX_COST_LIMIT
    guess_limit: int = 0

    def __post_init__(self) -> None:
        tables = {
            "chain costs": GAP_INDICES,
            "alternate costs": GAP_INDICES,
            "guess costs": LONGEST_MATCH,
        }
        for name, count in tables.items():
            field = name.replace(" ", "_")
            costs = tuple(getattr(self, field))
            object.__setattr__(self, field, costs)  # a file's list
            if len(costs) != count or not all(_is_integer(c, MAX_COST) for c in costs):
                raise ValueError(
                    f"{name} are {costs!r:.80}; expected {count} integers from 0 to {MAX_COST}"
                )
        for name, most in (("limit", MAX_COST_LIMIT), ("guess_limit", MAX_COST)):
            value = getattr(self, name)
            if not _is_integer(value, most):
                raise ValueError(
                    f"{name.replace('_', ' ')} is {value!r:.40}; expected an integer from 0 to "
                    f"{most}"
                )

    @property
    def guesses(self) -> bool:
        """Whether anything is ever guessed."""
        return min(self.guess_costs) < NO_GUESS


def _is_integer(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


@dataclass(frozen=True)
class Settings:
    """Parameters of speculation.

    Attributes
    ----------
    rows : int
        Tokens of a verify pass, the array's rows: the root, the chain and the alternates.
    draft_length : int, optional
        Longest chain, L, at most rows - 1, which is the default. 0 is plain decoding.
    threshold : float
        Drafting stops after a token whose logit margin is below this.
    choices : int
        The draft's best tokens at a chain position, the chain's own included; 1: no alternates.
    reranked : int
        The draft head's best tokens whose logits are then computed exactly, from the FP16 head;
        chain, margin and alternates follow these alone. 0: the draft head's own logits count.
    policy : Policy
        How long chains are and what else the verify pass checks.
    history : int
        How many of the last tokens are searched for what the policy may guess, a power of two.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    rows: int = 8
    draft_length: int | None = None
    threshold: float = 0.0
    choices: int = 4
    reranked: int = 0
    policy: Policy = Policy()
    history: int = DEFAULT_HISTORY

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows is {self.rows}; expected 1 to {MAX_ROWS}")
        if not 0 <= self.length < self.rows:
            raise ValueError(
                f"draft length is {self.draft_length}; expected 0 to rows - 1 = {self.rows - 1}"
            )
        if not self.threshold >= 0:
            raise ValueError(f"threshold is {self.threshold}; expected a number >= 0")
        if not 1 <= self.choices <= MAX_ROWS:
            raise ValueError(f"choices is {self.choices}; expected 1 to {MAX_ROWS}")
        if not 0 <= self.reranked <= MAX_RERANKED:
            raise ValueError(f"reranked is {self.reranked}; expected 0 (none) to {MAX_RERANKED}")
        if not isinstance(self.policy, Policy):
            raise ValueError(f"policy is {self.policy!r:.40}; expected a Policy")
        if self.history not in (1 << i for i in range(MAX_HISTORY.bit_length())):
            raise ValueError(
                f"history is {self.history}; expected a power of two up to {MAX_HISTORY}"
            )

    @property
    def length(self) -> int:
        """Longest chain."""
        return self.rows - 1 if self.draft_length is None else self.draft_length

    @property
    def offered(self) -> int:
        """Choices of a chain position: of tokens that are not re-ranked nothing is known."""
        return min(self.choices, self.reranked or self.choices)


def _fp32(x: float) -> float:
    """The FP32 number nearest to one that is not too large for it."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


#: Ways to sample: the largest of logits and noise that depends on seed, position and token
#: (`speq.model.gumbel`), or acceptance of drafted tokens by recursive rejection.
SAMPLERS = ("gumbel", "rsd")


@dataclass(frozen=True)
class Sampling:
    """Parameters of sampled decoding, for target and draft alike.

    Attributes
    ----------
    temperature : float
        Divides the logits; `MIN_TEMPERATURE` to `MAX_TEMPERATURE`.
    top_k : int
        Keep the k likeliest tokens; 0 keeps all.
    top_p : float
        Of these, keep the fewest likeliest whose probabilities sum to at least p; 0 < p <= 1.
    min_p : float
        Of these, keep those that are at least so many times as likely as the likeliest; 0 to 1.
    sampler : one of `SAMPLERS`
        With "gumbel" the text depends on seed, prompt and model alone, not on speculation. "rsd"
        accepts more of what is drafted.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    sampler: str = "gumbel"

    def __post_init__(self) -> None:
        if not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:  # NaN is not, either
            raise ValueError(
                f"temperature is {self.temperature}; expected {MIN_TEMPERATURE:g} to "
                f"{MAX_TEMPERATURE:g} (greedy decoding has no sampling)"
            )
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top-k is {self.top_k}; expected 0 (all tokens) to {MAX_TOP_K}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}; expected a number above 0 and up to 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min-p is {self.min_p}; expected a number from 0 to 1")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r:.40}; expected {' or '.join(SAMPLERS)}")

    @property
    def cutoff(self) -> float:
        """How far a logit may be from the largest one, a negative FP32 number or 0: T ln(min_p)."""
        if not self.min_p:
            return -math.inf
        return _fp32(self.temperature * math.log(self.min_p))

    def check_accelerated(self) -> None:
        """Raises ValueError if the accelerator cannot sample so."""
        if self.sampler != "gumbel":
            raise ValueError(
                f"the accelerator samples with the sampler gumbel; {self.sampler} is the golden "
                "model's"
            )
        if self.top_k or self.top_p < 1:
            raise ValueError(
                "the accelerator samples with temperature and min-p; top-k and top-p are the "
                "golden model's"
            )
