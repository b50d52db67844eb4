# SPDX-License-Identifier: Apache-2.0
"""`speq cycles`: predicted cycles, tokens per second and speedup of models too large to simulate.

`speq.model.prediction` says what is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speq.cli.notes import detail
from speq.cli.options import MOST_TOKENS, Cols, Rows, check_model, complete_model

if TYPE_CHECKING:
    from speq.model.checkpoint import ModelConfig
    from speq.model.cycles import Formats

LANES = "Elements that the vector unit takes in a cycle."
MAX_CLOCK = 100_000  # MHz
#: Latency of memory in cycles up to which tests compare predictions with the accelerator.
MAX_LATENCY = 48
#: Positions in the KV cache, if the model has as many.
DEFAULT_CONTEXT = 1024

Context = Annotated[
    int | None,
    typer.Option(
        help="Positions in the KV cache, at most the model's.",
        show_default=f"{DEFAULT_CONTEXT}, or the model's",
    ),
]
Encoded = Annotated[
    Path | None,
    typer.Option(help="The model as speq encode has written it: what its head drafts counts."),
]


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint's path, an alias, or a config.json of Hugging Face; no weights are "
            "read.",
            show_default="a table of known models",
            autocompletion=complete_model,
        ),
    ] = None,
    rows: Rows = 8,
    cols: Cols = 64,
    lanes: Annotated[
        int | None, typer.Option(help=LANES, show_default="8, or the columns if there are fewer")
    ] = None,
    clock: Annotated[float, typer.Option(help="Clock in MHz.")] = 500.0,
    latency: Annotated[int, typer.Option(help="Latency of memory in cycles.")] = 48,
    context: Context = None,
    acceptance: Annotated[
        list[float] | None,
        typer.Option(help="Share of drafted tokens accepted.", show_default="0.7, 0.8, 0.9"),
    ] = None,
    encoded: Encoded = None,
) -> None:
    """Predict cycles, tokens per second and speedup for models of known dimensions."""
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.engine_config import EngineConfig
    from speq.hw.memory.axi import AxiConfig

    check_conditions(clock, latency, context, acceptance or ())
    if encoded and model is None:
        raise ValueError("--encoded is of one model: name it")
    lanes = min(8, cols) if lanes is None else lanes
    AcceleratorConfig(EngineConfig(rows=rows, cols=cols), lanes=lanes)  # refuses what cannot be
    try:
        AxiConfig(data_bits=16 * cols)
    except ValueError as error:
        raise ValueError(f"cols is {cols}: no port is as wide: {error}") from error
    if model is not None:
        check_model(model)
    # These load torch: the options are right by now.
    from speq.cli.tables import figure_table, show
    from speq.host.cycles import predicted_passes
    from speq.model.cycles import uniform_formats
    from speq.model.loaders import read_config
    from speq.model.number_format import FormatConfig
    from speq.model.prediction import MODELS, WEIGHT_BYTES, per_bandwidth, predict

    models = MODELS if model is None else {model: read_config(model)}
    drafts = encoded_drafts(encoded, *models.values()) if encoded else Drafts()
    positions = chosen_context(models, context, rows)
    bandwidth = WEIGHT_BYTES * cols * clock / 1000
    cycles = (f"{kind}\nMcycles" for kind in ("plain", "draft", "verify"))
    names = ("model",) if model is None else ()
    rates = (
        f"{rate}\n{kind}" for rate in ("tokens\n/s", "per\nGB/s") for kind in ("plain", "spec.")
    )
    headings = ("drafts\ntaken", "L", *cycles, *rates, "speed\nup")
    table = figure_table("", *names, *headings, left=len(names))
    for name, config in models.items():
        detail(f"{name}: {config}")
        formats = drafts.formats
        if formats is None:
            formats = uniform_formats(config, FormatConfig())
        passes = predicted_passes(
            *(config, formats),
            rows=rows,
            cols=cols,
            lanes=lanes,
            latency=latency,
            context=positions,
            drafted_outputs=drafts.drafted_outputs,
        )
        for share in acceptance or (0.7, 0.8, 0.9):
            p = predict(passes, share, positions, drafts.reranked)
            both = (p.plain, p.cycles_per_token)
            rates = [clock * 1e6 / cycles for cycles in both]
            shares = [per_bandwidth(cycles, cols) for cycles in both]
            table.add_row(
                *(name for _ in names),
                f"{share:.0%}",
                str(p.length),
                *(f"{cycles / 1e6:.3f}" for cycles in (p.plain, p.draft, p.verify)),
                *(f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}" for rate in rates),
                *(f"{share:,.0f}" if share >= 1000 else f"{share:.3g}" for share in shares),
                f"{p.speedup:.2f}",
            )
        table.add_section()
    show(
        *(() if model is None else (model,)),
        f"{rows} x {cols} array, {lanes} lanes, {clock:g} MHz: {bandwidth:.4g} GB/s of weights",
        f"memory latency {latency} cycles, context {positions}",
        table,
    )


def check_conditions(
    clock: float, latency: int, context: int | None, acceptance: Iterable[float]
) -> None:
    """Raise ValueError for conditions that nothing can be predicted under: MHz, cycles, positions,
    and shares of drafted tokens."""
    if not 0 < clock <= MAX_CLOCK:
        raise ValueError(f"clock is {clock}; expected more than 0 and up to {MAX_CLOCK} MHz")
    if context is not None and not 0 <= context <= MOST_TOKENS:
        raise ValueError(f"context is {context}; expected 0 to {MOST_TOKENS} positions")
    if not 1 <= latency <= MAX_LATENCY:
        raise ValueError(
            f"latency is {latency}; the prediction holds for 1 to {MAX_LATENCY} cycles, which the "
            "ports' bursts hide"
        )
    for share in acceptance:
        if not 0 <= share <= 1:
            raise ValueError(f"acceptance is {share}; expected a probability, 0 to 1")


@dataclass(frozen=True)
class Drafts:
    """What drafts are: the formats of the encoded layers, by default the usual one of all; the
    outputs that the head drafts, by default all; and how many of its best are computed exactly."""

    formats: Formats | None = None
    drafted_outputs: int | None = None
    reranked: int = 0


def encoded_drafts(path: Path, config: ModelConfig) -> Drafts:
    """The drafts of an encoded file.

    Raises
    ------
    ValueError
        If the file is damaged, or its layers are not of a model of these dimensions.
    """
    from speq.model.checkpoint import linear_shapes
    from speq.model.encoded_file import read_encoded

    file, shapes = read_encoded(path), linear_shapes(config)
    for name, tensor in file.tensors.items():
        if shapes.get(name) != tensor.shape:
            raise ValueError(f"{path} is of another model: {name} is {list(tensor.shape)}")
    return Drafts(
        {name: tensor.config for name, tensor in file.tensors.items()},
        file.tensors["head"].drafted_outputs if "head" in file.tensors else None,
        file.settings["alternates"].reranked if file.settings else 0,
    )


def chosen_context(models: Mapping[str, ModelConfig], context: int | None, rows: int) -> int:
    """Positions in the KV cache for all of these models on an array of so many rows.

    Raises
    ------
    ValueError
        If a model does not have as many, or no accelerator has what it needs.
    """
    from speq.hw.engine_config import EngineConfig

    if context is None:
        context = min(DEFAULT_CONTEXT, *(config.context for config in models.values()))
    for name, config in models.items():
        if context > config.context:
            raise ValueError(f"context is {context}; that of {name} is {config.context}")
        longest = max(config.hidden, config.ffn_hidden, config.heads * config.head_dim)
        try:
            EngineConfig(rows=rows, max_k=max(longest, context + rows))
        except ValueError as error:
            raise ValueError(f"no accelerator is made for {name}: {error}") from error
    return context
