# SPDX-License-Identifier: Apache-2.0
"""`speq cycles`: predicted cycles, tokens per second and speedup of models too large to simulate.

The cycles of a pass are those of `speq.model.cycles`, which tests/sim/test_decoding.py compares
with the accelerator's own counters. A chain of L tokens, each of which the target accepts with
probability p, commits 1 + p + ... + p^L tokens per verify pass; leaf alternates and early exits,
which both help, are left out. L is the best one that the rows allow. The host's time is not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.checkpoint import ModelConfig
from speq.model.cycles import Engine, draft_pass, plain_pass, uniform_formats, verify_pass
from speq.model.number_format import FormatConfig

#: Latency of memory in cycles up to which tests compare predictions with the accelerator.
MAX_LATENCY = 48
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


def predict(config: ModelConfig, engine: Engine, acceptance: float, context: int = 0) -> Prediction:
    """Predict speculative decoding behind `context` positions, all layers drafted at 4 bits.

    Raises
    ------
    ValueError
        If the acceptance is not a probability.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}; expected a probability, 0 to 1")
    formats = uniform_formats(config, FormatConfig())
    plain = plain_pass(config, engine, context).cycles
    draft = draft_pass(config, engine, formats, context).cycles
    choices = []
    for length in range(engine.rows):
        verify = verify_pass(config, engine, formats, length + 1, context).cycles
        committed = sum(acceptance**i for i in range(length + 1))
        speedup = plain * committed / (length * draft + verify)
        choices.append(Prediction(plain, draft, verify, length, speedup))
    return max(choices, key=lambda choice: choice.speedup)


def run(
    rows: int, cols: int, clock: float, latency: int, context: int, acceptances: Sequence[float]
) -> None:
    """Print the table; `clock` in MHz, `latency` of memory in cycles.

    Raises
    ------
    ValueError
        If a value is out of range.
    """
    if clock <= 0 or context < 0:
        raise ValueError(f"clock and context are {clock} and {context}; expected more than 0, or 0")
    if not 1 <= latency <= MAX_LATENCY:
        raise ValueError(
            f"latency is {latency}; the prediction holds for 1 to {MAX_LATENCY} cycles, which the "
            "ports' bursts hide"
        )
    # Refuses arrays that cannot be made, or that are wider than a port.
    AcceleratorConfig(
        EngineConfig(rows=rows, cols=cols),
        weights=AxiConfig(data_bits=16 * cols),
        data=AxiConfig(data_bits=16 * cols),
    )
    engine = Engine(rows=rows, cols=cols, latency=latency)
    bandwidth = 2 * cols * clock / 1000
    table = Table(
        title=f"{rows} x {cols} array at {clock:g} MHz: {bandwidth:.4g} GB/s of weights; "
        f"memory latency {latency} cycles, context {context}",
        title_justify="left",
    )
    columns = ("model", "accepted", "L", "plain", "draft", "verify", "tokens/s plain", "tokens/s")
    for name in (*columns, "speedup"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, config in MODELS.items():
        for acceptance in acceptances:
            p = predict(config, engine, acceptance, context)
            rates = [clock * 1e6 / cycles for cycles in (p.plain, p.cycles_per_token)]
            table.add_row(
                name,
                f"{acceptance:.0%}",
                str(p.length),
                *(f"{cycles / 1e6:.3f} M" for cycles in (p.plain, p.draft, p.verify)),
                *(f"{rate:.4g}" for rate in rates),
                f"{p.speedup:.2f}",
            )
        table.add_section()
    Console(width=None if Console().is_terminal else 120).print(table)
