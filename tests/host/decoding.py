# SPDX-License-Identifier: Apache-2.0
"""Decoding with the driver compared with the golden model, for tests on any board."""

from __future__ import annotations

from dataclasses import replace

import torch

from speq.host.driver import Host
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.checkpoint import Model, linear_names
from speq.model.format import EncodedTensor, encode
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings, Step, generate
from speq.model.transformer import prepare_draft_linears
from speq.sim.runner import seed

SEED = seed()
#: Tokens that `check` decodes, unless told otherwise.
TOKENS = 10
#: Statistics of decoding and the accelerator's counters of the same things.
COUNTED = {
    "draft_passes": "DRAFT_PASSES",
    "verify_passes": "VERIFY_PASSES",
    "committed": "COMMITTED",
    "accepted": "ACCEPTED",
    "alternates": "ALTERNATES",
    "alternate_hits": "TREE_HITS",
}
SMALL = EngineConfig(rows=4, cols=8, max_k=256, max_o=1024)


def system(
    engine: EngineConfig = SMALL, weights: int | None = None, data: int | None = None
) -> AcceleratorConfig:
    """A configuration with ports of so many bits, by default as wide as they can be."""
    ports = {
        name: bits and AxiConfig(data_bits=bits)
        for name, bits in (("weights", weights), ("data", data))
    }
    return AcceleratorConfig(engine, **ports)


def encoded_linears(model: Model, config: FormatConfig | None = None) -> dict[str, EncodedTensor]:
    """All linear layers, for an array of 16 columns."""
    return {
        name: encode(model.linear_weight(name), config or FormatConfig(), name=name)
        for name in linear_names(model.config)
    }


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns of float32 numbers."""
    return x.view(torch.int32)


def assert_same_steps(got: list[Step], expected: list[Step]) -> None:
    """Everything about the steps of two decoders is equal, the logits bit for bit."""
    assert [step.tokens for step in got] == [step.tokens for step in expected], f"SPEQ_SEED={SEED}"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        wrong = (bits(a.logits) != bits(b.logits)).nonzero().tolist()
        if wrong:
            row, token = wrong[0]
            raise AssertionError(
                f"SPEQ_SEED={SEED}: step {number}, row {row}, logit {token}: expected "
                f"{bits(b.logits)[row, token] & 0xFFFFFFFF:08x}, got "
                f"{bits(a.logits)[row, token] & 0xFFFFFFFF:08x} ({len(wrong)} differ)"
            )
        assert replace(a, logits=b.logits) == b, f"SPEQ_SEED={SEED}: step {number}"


def check(
    host: Host,
    model: Model,
    encoded: dict[str, EncodedTensor] | None,
    prompt: list[int],
    settings: Settings,
    **options: object,
) -> list[Step]:
    """Decode with the driver and with the golden model and compare."""
    options = {"max_tokens": TOKENS, "settings": settings} | options
    got = list(host.generate(prompt, **options))
    layers = prepare_draft_linears(encoded) if encoded else None
    assert_same_steps(got, list(generate(model, prompt, layers, **options)))
    return got
