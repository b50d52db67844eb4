# SPDX-License-Identifier: Apache-2.0
"""`speq generate`: text from a model by lossless speculative decoding, streamed as it is committed.

The text goes to standard output and nothing else does. On a terminal, the tokens that the draft, an
alternate or a guess got right and the target's own are told apart by colour. Progress and the
figures at the end go to standard error. With `--json` all of it is an object on standard output
(`speq.cli.decoding_output`).

The steps come from the golden model, or from the accelerator's RTL in the simulator, which gives
the same ones, with every cycle counted. In a chat the KV cache is kept from turn to turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from speq.cli.conversation import EXIT, Conversation, given_prompt, turns
from speq.cli.decoding import (
    Backend,
    Decoder,
    Decoding,
    Request,
    Sampler,
    changed,
    chosen_sampling,
    chosen_settings,
)
from speq.cli.decoding_output import JsonOutput, TextOutput
from speq.cli.notes import detail
from speq.cli.options import (
    DEFAULT_THRESHOLD,
    LANES_DEFAULT,
    LANES_HELP,
    DraftLength,
    GroupOfEncode,
    MaxTokens,
    ModelName,
    Seed,
    SplitOfEncode,
    check_model,
    chosen_format,
    finite,
    refuse_unused,
)
from speq.cli.simulation import check_array

#: Columns of the simulated array.
DEFAULT_COLS = 16


def run(
    model: ModelName,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to answer, or with --raw to continue; - reads standard input."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="The prompt is the text in this file (UTF-8); - is standard input."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message, before all others.")] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help=f"Several turns, one a line, up to {EXIT} or the input's end."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print an object with text, tokens and figures.")
    ] = False,
    mode: Annotated[
        Decoding, typer.Option(help="Speculative decoding, or FP16 token by token.")
    ] = Decoding.SPEQ,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token.", callback=finite)
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest of this sum.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Sample from those at least so many times the likeliest's.")
    ] = 0.0,
    sampler: Annotated[
        Sampler,
        typer.Option(help="gumbel: the same text with any drafts; rsd: recursive rejection."),
    ] = Sampler.GUMBEL,
    encoded: Annotated[
        Path | None, typer.Option(help="The model as speq encode has written it.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="With rtl: what to load, as speq image has written it, in its array."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the array: tokens in a verify pass.", show_default="8"),
    ] = None,
    draft_length: DraftLength = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Stop drafting below this margin of the best logit.",
            callback=finite,
            show_default=f"{DEFAULT_THRESHOLD:g}",
        ),
    ] = None,
    choices: Annotated[
        int | None,
        typer.Option(help="Candidates per position for spare rows; 1: none.", show_default="4"),
    ] = None,
    reranked: Annotated[
        int | None,
        typer.Option(
            help="Best drafted tokens whose logits are computed exactly, 1 to 8; 0: none.",
            show_default="0, or the file's",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt: no chat format.")
    ] = False,
    group: GroupOfEncode = None,
    split: SplitOfEncode = None,
    backend: Annotated[
        Backend, typer.Option(help="The golden model, or the accelerator's RTL, simulated.")
    ] = Backend.GOLDEN,
    cols: Annotated[
        int | None,
        typer.Option(help="With rtl: columns of the array.", show_default=str(DEFAULT_COLS)),
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(help=f"With rtl: {LANES_HELP}", show_default=LANES_DEFAULT)
    ] = None,
) -> None:
    """Generate text losslessly with the draft model inside the weights, and report the speedup.

    With --chat, every line of standard input is a turn of a conversation.
    """
    from speq.model.settings import Settings

    speculative, rtl = mode is Decoding.SPEQ, backend is Backend.RTL
    sampling = chosen_sampling(temperature, top_k, top_p, min_p, sampler)
    if rtl and sampling is not None:
        sampling.check_accelerated()
    if not rtl:
        for option, value in (("--cols", cols), ("--lanes", lanes)):
            if value is not None:
                raise ValueError(f"{option} is of the simulated array: give --backend rtl")
    if image is not None:
        if not rtl:
            raise ValueError("--image is for the simulated accelerator: give --backend rtl")
        refuse_unused(
            "with --image, which says what is encoded and for which array",
            encoded=encoded,
            rows=rows,
            cols=cols,
            lanes=lanes,
            group=group,
            split=split,
        )
    if raw:
        refuse_unused("with --raw, which has no chat format", system=system)
    given = {
        "rows": rows,
        "draft_length": draft_length,
        "threshold": threshold,
        "choices": choices,
        "reranked": reranked,
    }
    if not speculative:
        refuse_unused(
            "with --mode fp16",
            encoded=encoded,
            image=image,
            draft_length=draft_length,
            threshold=threshold,
            choices=choices,
            reranked=reranked,
            group=group,
            split=split,
        )
        if not rtl:
            refuse_unused("with --mode fp16 in the golden model", rows=rows)
    used_rows = Settings().rows if rows is None else rows
    used_cols = DEFAULT_COLS if cols is None else cols
    used_lanes = check_array(used_rows, used_cols, lanes) if rtl else 0
    request = Request(
        model=model,
        mode=mode,
        backend=backend,
        max_tokens=max_tokens,
        seed=seed,
        sampling=sampling,
        encoded=encoded,
        number_format=chosen_format(group, split, encoded),
        cols=used_cols,
        lanes=used_lanes,
        chat=chat,
        image=image,
    )
    if encoded is None and image is None:
        chosen_settings(None, **given)
    first = given_prompt(prompt, prompt_file, chat)
    check_model(model)
    # These load torch: the options are right by now, as far as they can be known to be.
    from speq.host.image_file import read_image
    from speq.model.encoded_file import read_encoded
    from speq.model.loaders import load_model

    file = read_encoded(encoded) if encoded else None
    loaded_image = read_image(image) if image else None
    if loaded_image:
        settings = changed(loaded_image.settings, **given)
        config = loaded_image.config
        request = replace(request, cols=config.engine.cols, lanes=config.lanes)
    else:
        settings = chosen_settings(file, **given)
    loaded = load_model(model)
    conversation = Conversation(loaded, system=system, raw=raw, chat=chat)
    said = turns(first) if chat else iter([first or ""])
    turn = next(said, None)
    if turn is None:
        return
    ids = conversation.ask(turn)
    detail(f"{settings}; sampling: {sampling}; seed {seed}; prompt of {len(ids)} tokens")
    with Decoder(request, loaded, file, settings, ids, loaded_image) as decoder:
        if json_output:
            conditions = decoder.conditions()
            conditions["settings"] |= {"raw": raw, "chat": chat, "system": system}
            output = JsonOutput(conditions)
        else:
            output = TextOutput(
                "RTL simulation" if rtl else "golden model", seed if sampling else None
            )
        converse(decoder, conversation, ids, said, output)


def converse(
    decoder: Decoder,
    conversation: Conversation,
    prompt: list[int],
    said: Iterator[str],
    output: TextOutput | JsonOutput,
) -> None:
    """Decode behind a prompt, then behind everything else that is said, up to its end.

    Raises
    ------
    ValueError
        If decoding ended with an error, or the conversation fills the model's context.
    KeyboardInterrupt
        If it was interrupted, behind the text and figures so far.
    """
    while True:
        reply = decoder.decode(prompt, output.show)
        output.finish(reply)
        if reply.error is not None:
            raise reply.error
        if reply.stop == "interrupted":
            raise KeyboardInterrupt
        conversation.answer(reply.text)
        turn = next(said, None)
        if turn is None:
            return
        prompt = conversation.ask(turn)
