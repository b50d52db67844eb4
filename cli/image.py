# SPDX-License-Identifier: Apache-2.0
"""`speq image`: write what the accelerator's memory holds before the first run, or say what a file
of that kind holds.

docs/image.md describes the file; `speq.host.image` says what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speq.cli.decoding import chosen_settings
from speq.cli.notes import detail
from speq.cli.options import (
    MOST_TOKENS,
    Force,
    chain_end,
    check_model,
    chosen_format,
    complete_model,
    refuse_unused,
)
from speq.cli.progress import status, with_passing_bar
from speq.cli.verilog import (
    AddressBits,
    ArrayCols,
    ArrayGroup,
    ArrayRows,
    ArraySplit,
    Choices,
    DataBits,
    Description,
    DraftRows,
    History,
    Lanes,
    MaxK,
    PresetName,
    QueryHeads,
    Scratch,
    WeightsBits,
    configuration,
    starting_point,
)
from speq.model.input_file import IMAGE

if TYPE_CHECKING:
    from speq.host.image import Image
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.engine_config import EngineConfig
    from speq.model.encoded_file import EncodedModel
    from speq.model.settings import Settings


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint's path, or an alias such as smollm2.", autocompletion=complete_model
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The image file to write.")
    ] = None,
    info: Annotated[
        Path | None, typer.Option(help="Say what this image file holds, in place of writing one.")
    ] = None,
    encoded: Annotated[
        Path | None, typer.Option(help="The model as speq encode has written it.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Positions that the KV cache has room for.",
            show_default="the model's, or as many as the accelerator allows",
        ),
    ] = None,
    config: Description = None,
    preset: PresetName = None,
    rows: ArrayRows = None,
    cols: ArrayCols = None,
    draft_rows: DraftRows = None,
    max_k: MaxK = None,
    group: ArrayGroup = None,
    split: ArraySplit = None,
    weights_bits: WeightsBits = None,
    data_bits: DataBits = None,
    address_bits: AddressBits = None,
    choices: Choices = None,
    history: History = None,
    lanes: Lanes = None,
    query_heads: QueryHeads = None,
    scratch: Scratch = None,
    force: Force = False,
) -> None:
    """Write one file with all that a host puts into the accelerator's memory for a model, or say
    what such a file holds."""
    given = {
        "rows": rows,
        "cols": cols,
        "draft_rows": draft_rows,
        "max_k": max_k,
        "group": group,
        "split": split,
        "weights_bits": weights_bits,
        "data_bits": data_bits,
        "address_bits": address_bits,
        "choices": choices,
        "history": history,
        "lanes": lanes,
        "query_heads": query_heads,
        "scratch": scratch,
    }
    if info is not None:
        others = {"output": output, "encoded": encoded, "context": context}
        refuse_unused("with --info", **others, config=config, preset=preset, **given)
        if model is not None:
            raise ValueError("--info is of a file alone: leave out the model")
        show_info(info)
        return
    if model is None or output is None:
        raise typer.BadParameter("name a model and a file to write with -o, or one with --info")
    chosen_format(group, split, encoded)
    base, options = starting_point(config, preset, given)
    accelerator = chosen_accelerator(base, options)

    from speq.hw.common.files import replacing

    with replacing(output, IMAGE, force=force) as temporary:
        check_model(model)
        # These load torch: options and output are right by now, as far as they can be known to be.
        from speq.host.image import model_image
        from speq.host.image_file import write_image
        from speq.model.encoded_file import read_encoded
        from speq.model.encoding import encode_linears, tensors_for
        from speq.model.loaders import load_model

        file = read_encoded(encoded) if encoded else None
        if file and base is None:
            number_format = next(iter(file.tensors.values())).config
            engine = replace(accelerator.engine, format=number_format)
            accelerator = replace(accelerator, engine=engine)
        detail(f"accelerator: {accelerator}")
        loaded = load_model(model)
        if file and encoded:
            tensors = tensors_for(loaded, file, encoded, decode=False)
        else:
            engine = accelerator.engine
            tensors = encode_linears(
                loaded, engine.format, columns=engine.cols, track=with_passing_bar
            )
        capacity = None
        if context is not None:
            capacity = min(context, loaded.config.context) + accelerator.engine.rows
        settings = image_settings(accelerator, file)
        with status("writing the image"), _naming(encoded):
            image = model_image(accelerator, loaded, tensors, capacity=capacity, settings=settings)
            write_image(temporary, image)
    print(f"model:    {image.name}, {len(tensors)} encoded layers")
    print(f"memory:   {image.size / 1e6:.1f} MB from any multiple of {image.alignment} bytes on")
    print(f"KV cache: {image.capacity} entries")
    print(f"written:  {output}, {output.stat().st_size / 1e6:.1f} MB")


@contextmanager
def _naming(encoded: Path | None) -> Iterator[None]:
    """What is wrong with the tensors of an encoded file is reported with its name."""
    try:
        yield
    except ValueError as error:
        if encoded is None:
            raise
        raise ValueError(f"{encoded}: {error}") from error


def chosen_accelerator(
    base: AcceleratorConfig | EngineConfig | None, options: dict[str, int]
) -> AcceleratorConfig:
    """The configuration of the options. Raises ValueError if it is an engine's, impossible or
    without a vector unit."""
    from speq.host.checks import check_vector_unit
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.engine_config import EngineConfig

    if isinstance(base, EngineConfig):
        raise ValueError("--config is of a matrix engine alone: give one of an accelerator")
    chosen = configuration(base, False, options)
    assert isinstance(chosen, AcceleratorConfig)
    check_vector_unit(chosen)
    return chosen


def image_settings(config: AcceleratorConfig, file: EncodedModel | None) -> Settings:
    """An encoded file's settings of speculation, or the usual ones, as far as an accelerator can
    follow them."""
    from speq.model.settings import NO_GUESS

    settings = chosen_settings(file, rows=config.engine.rows)
    policy = settings.policy
    if not config.history:
        costs = (NO_GUESS,) * len(policy.guess_costs)
        policy = replace(policy, guess_costs=costs, guess_limit=0)
    return replace(
        settings,
        policy=policy,
        history=config.history or settings.history,
        choices=min(settings.choices, config.choices),
        reranked=min(settings.reranked, config.choices),
    )


def show_info(path: Path) -> None:
    """Print what an image file holds. Raises ValueError and OSError as `read_image` does."""
    from speq.cli.tables import figure_table, show
    from speq.host.image_file import DESCRIPTIONS, read_image
    from speq.host.layout import Kind

    image = read_image(path)
    regions = figure_table("", "region", "of", "offset", "bytes", "in the file", "on chip", left=2)
    kinds = figure_table("", "in all", "what it is", "regions", "bytes", "of memory", left=2)
    for part in image.parts:
        stored = "yes" if part.kind.is_given else ""
        what, _ = DESCRIPTIONS[part.kind]
        on_chip = min(part.start + part.size, image.scratch.stop) - max(
            part.start, image.scratch.start
        )
        chip = "" if on_chip <= 0 else "yes" if on_chip == part.size else f"{on_chip:,} bytes"
        regions.add_row(what, part.name, f"{part.start:#x}", f"{part.size:,}", stored, chip)
    for kind in Kind:
        sizes = [part.size for part in image.parts if part.kind is kind]
        if sizes:
            what, purpose = DESCRIPTIONS[kind]
            share = f"{sum(sizes) / image.size:.1%}"
            kinds.add_row(what, purpose, str(len(sizes)), f"{sum(sizes):,}", share)
    show(regions, "", kinds, "", *_summary(path, image))


def _summary(path: Path, image: Image) -> Iterator[str]:
    """Lines on what an image is of and for."""
    config, settings = image.config, image.settings
    engine, number_format = config.engine, config.engine.format
    yield f"model:       {image.name}, {image.vocabulary} tokens, {image.context} positions"
    yield f"weights:     SHA-256 {image.digest.hex()}"
    yield (
        f"accelerator: {engine.rows} x {engine.cols}, {engine.draft_rows} drafting, K up to "
        f"{engine.max_k}, O up to {engine.max_o}, group {number_format.group}, split "
        f"{number_format.split},"
    )
    yield (
        f"             ports of {config.weights.data_bits} and {config.data.data_bits} bits, "
        f"addresses of {config.address_bits}, rankings of {config.choices}, history of "
        f"{config.history}"
    )
    yield (
        f"             a vector unit of {config.lanes} lanes for up to {config.query_heads} query "
        "heads"
    )
    if config.scratch:
        yield f"             {config.scratch:,} bytes of scratch memory"
    yield (
        f"memory:      {image.size:,} bytes from any multiple of {image.alignment} on, the last "
        f"{image.size - image.write_offset:,} written"
    )
    yield f"KV cache:    {image.capacity} entries"
    if settings.length:
        end = chain_end(settings.threshold, settings.policy.limit)
        yield (
            f"speculation: draft length {settings.length}, {end}, {settings.choices} choices, "
            f"{settings.reranked} re-ranked"
        )
    else:
        yield "speculation: none"
    yield f"file:        {path.stat().st_size:,} bytes, all checksums right"
