# SPDX-License-Identifier: Apache-2.0
"""Speed of speculative decoding on the accelerator, predicted for models of known dimensions.

The cycles of a pass are those of `speq.model.pass_cycles`, which tests/sim/test_cycles.py compares
with the accelerator's own counters: everything is counted. A chain of L tokens, each of which the
target accepts with probability p, commits 1 + p + ... + p^L tokens per verify pass; alternates and
early exits, which both help, are left out. L is the best one that the rows allow.
"""

from __future__ import annotations

from dataclasses import dataclass

from speq.model.checkpoint import ModelConfig
from speq.model.pass_cycles import PassCycles

#: Bytes of a weight, of which the array takes one in each column and cycle.
WEIGHT_BYTES = 2

#: Dimensions of the models in the table.
MODELS = {
    "SmolLM2-135M": ModelConfig(
        *("llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192),
        norm_eps=1e-5,
        rope_base=100_000.0,
        attention_scale=64**-0.5,
        tied_head=True,
    ),
    "Llama-3.1-8B": ModelConfig(
        *("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072),
        norm_eps=1e-5,
        rope_base=500_000.0,
        attention_scale=128**-0.5,
        tied_head=False,
    ),
    "Llama-2-13B": ModelConfig(
        *("llama", 32_000, 5120, 13_824, 40, 40, 40, 128, 4096),
        norm_eps=1e-5,
        rope_base=10_000.0,
        attention_scale=128**-0.5,
        tied_head=False,
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Speed of one model at one acceptance rate.

    Attributes
    ----------
    plain, draft, verify : int
        Cycles of a pass.
    length : int
        The chain's length that is fastest.
    speedup : float
        Of speculative over plain decoding on the same array.
    """

    plain: int
    draft: int
    verify: int
    length: int
    speedup: float

    @property
    def cycles_per_token(self) -> float:
        """Of speculative decoding."""
        return self.plain / self.speedup


def per_bandwidth(cycles: float, cols: int) -> float:
    """Tokens per second for each GB/s that so many columns can take of weights, at so many cycles
    per token and whatever the clock: the tokens that come for a gigabyte."""
    return 1e9 / (WEIGHT_BYTES * cols * cycles)


def predict(
    cycles: PassCycles, acceptance: float, context: int = 0, reranked: int = 0
) -> Prediction:
    """Predict speculative decoding behind `context` positions, with the logits of each draft pass's
    `reranked` best tokens computed exactly, each in its own tile.

    Raises
    ------
    ValueError
        If the acceptance is not a probability.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}; expected a probability, 0 to 1")
    plain, draft = cycles.plain(context), cycles.draft(context, reranked)
    choices = []
    for length in range(cycles.rows):
        verify = cycles.verify(length + 1, context)
        committed = sum(acceptance**i for i in range(length + 1))
        speedup = plain * committed / (length * draft + verify)
        choices.append(Prediction(plain, draft, verify, length, speedup))
    return max(choices, key=lambda choice: choice.speedup)
