# SPDX-License-Identifier: Apache-2.0
"""The layers of `speq demo`, their products by the golden model, and the table of results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from speq.cli.tables import figure_table
from speq.hw import EngineConfig, Mode
from speq.hw.engine_config import DRAFT_LANES
from speq.model.arith import draft_gemm, quantize_activations, verify_gemm
from speq.model.checkpoint import LINEARS
from speq.model.format import encode
from speq.model.loaders import load_model
from speq.model.transformer import linear_inputs
from speq.sim.benches.gemm_engine import Gemm, GemmResult
from speq.sim.compare import mismatched_bits

PROMPT = "Write a short story about a lighthouse keeper who repairs clocks."

#: Student's t distributions (degrees of freedom, scale) of the weights and of the activations of
#: SmolLM2-135M's block 12, fitted by maximum likelihood; and O, K.
FITTED_LAYERS = {
    "q_proj": ((4.6, 0.166), (3.0, 0.098), (576, 576)),
    "k_proj": ((9.2, 0.196), (3.0, 0.098), (192, 576)),
    "v_proj": ((20.6, 0.164), (3.0, 0.098), (192, 576)),
    "o_proj": ((8.8, 0.142), (2.6, 0.144), (576, 576)),
    "gate_proj": ((11.7, 0.165), (5.0, 0.094), (1536, 576)),
    "up_proj": ((15.6, 0.187), (5.0, 0.094), (1536, 576)),
    "down_proj": ((12.4, 0.179), (2.4, 0.082), (576, 1536)),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer: weights float16 [O, K] and activations float16 [T, K]."""

    name: str
    weights: torch.Tensor
    activations: torch.Tensor


def real_layers(block: int, tokens: int) -> list[Layer]:
    """The layers of a SmolLM2-135M block with the activations of the prompt's last tokens."""
    model = load_model("smollm2")
    if not 0 <= block < model.config.blocks:
        raise ValueError(f"block is {block}; the model has blocks 0 to {model.config.blocks - 1}")
    ids = model.tokenizer.encode_chat(PROMPT)
    inputs = linear_inputs(model, ids, block=block)
    return [
        Layer(name, model.weights[f"block.{block}.{name}"], inputs[name][-tokens:])
        for name in LINEARS
    ]


def random_layers(tokens: int, seed: int) -> list[Layer]:
    """Random layers of the same shapes with the fitted distributions."""
    rng = np.random.default_rng(seed)

    def sample(distribution: tuple[float, float], shape: tuple[int, int]) -> torch.Tensor:
        freedom, scale = distribution
        return torch.from_numpy((rng.standard_t(freedom, shape) * scale).astype(np.float16))

    return [
        Layer(name, sample(weights, shape), sample(activations, (tokens, shape[1])))
        for name, (weights, activations, shape) in FITTED_LAYERS.items()
    ]


def gemms_with_golden(layers: list[Layer], config: EngineConfig) -> list[tuple[Gemm, np.ndarray]]:
    """For each layer the draft and the verify GEMM, with the golden model's output bits."""
    pairs = []
    for layer in layers:
        encoded = encode(layer.weights, config.format, name=layer.name, columns=config.cols)
        draft_x = quantize_activations(layer.activations[-1:], config.format.group)
        for gemm, golden in (
            (Gemm(draft_x, encoded, name=layer.name), draft_gemm(draft_x, encoded)),
            (
                Gemm(layer.activations, encoded, name=layer.name),
                verify_gemm(layer.activations, layer.weights),
            ),
        ):
            pairs.append((gemm, golden.numpy().view(np.uint32)))
    return pairs


def report(
    pairs: list[tuple[Gemm, np.ndarray]], results: list[GemmResult], config: EngineConfig
) -> tuple[Table, int, float]:
    """The table, the number of mismatched bits, and draft cycles over verify cycles."""
    table = figure_table(
        f"{config.rows} x {config.cols} engine, generated Verilog on Verilator",
        *("layer", "K", "O", "mode", "T", "cycles", "MACs\n/cycle", "utilisation"),
        "mismatched\nbits",
    )
    cycles_by_mode = {Mode.DRAFT: 0, Mode.VERIFY: 0}
    mismatches = 0
    for (gemm, golden), result in zip(pairs, results, strict=True):
        tokens, k, o = gemm.size
        cycles = result.cycles
        rate = tokens * k * o / cycles
        per_token = config.cols * (DRAFT_LANES if gemm.mode is Mode.DRAFT else 1)
        wrong = mismatched_bits(golden, result.output)
        mismatches += wrong
        cycles_by_mode[gemm.mode] += cycles
        table.add_row(
            *(gemm.name, str(k), str(o), gemm.mode.name.lower(), str(tokens), f"{cycles:,}"),
            *(f"{rate:.1f}", f"{rate / (tokens * per_token):.1%}", str(wrong)),
        )
    return table, mismatches, cycles_by_mode[Mode.DRAFT] / cycles_by_mode[Mode.VERIFY]
