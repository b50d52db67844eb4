# SPDX-License-Identifier: Apache-2.0
"""The command line `speq`: its commands, their options and how errors are reported.

Each command's work is in a module of its own that is imported only when the command runs, so that
`speq --help` does not wait for torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="speq",
    help="SPEQ: an LLM accelerator whose 4-bit draft model lies inside the FP16 weights.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Group = Annotated[int, typer.Option(help="Weights that share a base exponent: 32, 64 or 128.")]
Split = Annotated[int, typer.Option(help="Exponents told apart by their top mantissa bit: 0 to 3.")]
Width = Annotated[int, typer.Option(help="Bits of a draft weight: 4, 5 or 6.")]
Seed = Annotated[int, typer.Option(envvar="SPEQ_SEED", help="Seed of everything random.")]


@app.command("verilog")
def verilog_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="The Verilog file to write.")],
    rows: Annotated[int, typer.Option(help="Rows of the array: tokens in a verify pass.")] = 8,
    cols: Annotated[int, typer.Option(help="Columns of the array: outputs in a tile.")] = 16,
    draft_rows: Annotated[int, typer.Option(help="Rows that can also draft.")] = 1,
    max_k: Annotated[int, typer.Option(help="Longest dot product that the engine stores.")] = 2048,
    group: Group = 64,
    split: Split = 2,
    width: Width = 4,
    weights_bits: Annotated[
        int | None,
        typer.Option(help="Data width of the weights port.", show_default="16 per column"),
    ] = None,
    data_bits: Annotated[
        int | None,
        typer.Option(help="Data width of the data port.", show_default="16 per column"),
    ] = None,
    address_bits: Annotated[int, typer.Option(help="Bits of an address in memory.")] = 40,
    engine: Annotated[
        bool, typer.Option("--engine", help="Only the matrix engine, without the accelerator.")
    ] = False,
) -> None:
    """Write the accelerator as one Verilog-2005 file, with its register map, C header, FuseSoC core
    and an example of its use."""
    from speq.cli.verilog import Ports, run
    from speq.hw import EngineConfig
    from speq.model.number_format import FormatConfig

    config = EngineConfig(
        rows=rows,
        cols=cols,
        format=FormatConfig(group=group, split=split, width=width),
        draft_rows=draft_rows,
        max_k=max_k,
    )
    run(output, config, None if engine else Ports(weights_bits, data_bits, address_bits))


@app.command("encode")
def encode_command(
    model: Annotated[str, typer.Argument(help="A checkpoint's path, or an alias such as smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The safetensors file to write.")],
    group: Group = 64,
    columns: Annotated[int, typer.Option(min=1, help="Columns of the array that reads it.")] = 16,
    rows: Annotated[int, typer.Option(help="Rows of the array: tokens in a verify pass.")] = 8,
    choices: Annotated[int, typer.Option(help="Candidates per position for spare rows.")] = 4,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Calibration prompts (JSON: kind -> list).", show_default="shipped"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of a calibration text.")] = 96,
    verify: Annotated[bool, typer.Option("--verify", help="Read back and compare bits.")] = False,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="One format for all tensors, no calibration.")
    ] = False,
    split: Annotated[
        int | None, typer.Option(help="With --fixed: 0 to 3.", show_default="2")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="With --fixed: 4, 5 or 6.", show_default="4")
    ] = None,
    tensors: Annotated[
        str | None,
        typer.Option(help="With --fixed: only tensors that this regular expression finds."),
    ] = None,
) -> None:
    """Encode a model's linear layers so that the draft inside them is as good as can be."""
    from speq.cli.encode import Request, run

    run(
        Request(
            model=model,
            output=output,
            group=group,
            columns=columns,
            fixed=fixed,
            split=split,
            width=width,
            pattern=tensors,
            rows=rows,
            choices=choices,
            prompts=prompts,
            max_tokens=max_tokens,
            verify=verify,
        )
    )


@app.command("verify-file")
def verify_file_command(
    file: Annotated[Path, typer.Argument(help="A file that speq encode has written.")],
    model: Annotated[
        str | None, typer.Option(help="The checkpoint.", show_default="the one the file names")
    ] = None,
) -> None:
    """Check that an encoded file decodes to its checkpoint's weights bit for bit."""
    from speq.cli.encode import verify

    verify(file, model)


@app.command("demo")
def demo_command(
    rows: Annotated[int, typer.Option(help="Rows of the array.")] = 8,
    cols: Annotated[int, typer.Option(help="Columns of the array.")] = 16,
    block: Annotated[int, typer.Option(help="The transformer block whose layers run.")] = 0,
    seed: Seed = 0,
) -> None:
    """Run a real LLM's layers through the generated Verilog and compare every bit."""
    from speq.cli.demo import run

    run(rows, cols, block, seed)


@app.command("demo-decode")
def demo_decode_command(
    model: Annotated[str, typer.Option(help="A checkpoint's path, or an alias.")] = "smollm2",
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "The quick brown fox jumps",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 12,
    rows: Annotated[int, typer.Option(help="Rows of the array: tokens in a verify pass.")] = 8,
    cols: Annotated[int, typer.Option(help="Columns of the array: outputs in a tile.")] = 32,
    draft_length: Annotated[int, typer.Option(help="Most tokens to draft.")] = 4,
    threshold: Annotated[
        float, typer.Option(help="Stop drafting below this margin of the best logit.")
    ] = 0.5,
) -> None:
    """Decode with a real LLM on the accelerator's RTL and compare every token and logit bit."""
    from speq.cli.demo_decode import Request, run

    run(Request(model, prompt, max_tokens, rows, cols, draft_length, threshold))


class Decoding(StrEnum):
    """How `speq generate` decodes."""

    SPEQ = "speq"
    FP16 = "fp16"


class Backend(StrEnum):
    """What `speq generate` decodes with."""

    GOLDEN = "golden"
    RTL = "rtl"


@app.command("generate")
def generate_command(
    model: Annotated[str, typer.Argument(help="A checkpoint's path, or an alias such as smollm2.")],
    prompt: Annotated[str, typer.Option(help="What to answer, or with --raw to continue.")],
    mode: Annotated[
        Decoding, typer.Option(help="Speculative decoding, or FP16 token by token.")
    ] = Decoding.SPEQ,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    seed: Seed = 0,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest of this sum.")] = 1.0,
    encoded: Annotated[
        Path | None, typer.Option(help="The model as speq encode has written it.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the array: tokens in a verify pass.", show_default="8"),
    ] = None,
    draft_length: Annotated[
        int | None, typer.Option(help="Most tokens to draft.", show_default="rows - 1")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Stop drafting below this margin of the best logit.", show_default="2"),
    ] = None,
    choices: Annotated[
        int | None,
        typer.Option(help="Candidates per position for spare rows; 1: none.", show_default="4"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt: no chat format.")
    ] = False,
    group: Annotated[int | None, typer.Option(help="As of encode.", show_default="64")] = None,
    split: Annotated[int | None, typer.Option(help="As of encode.", show_default="2")] = None,
    width: Annotated[int | None, typer.Option(help="As of encode.", show_default="4")] = None,
    head_width: Annotated[
        int | None, typer.Option(help="Draft bits of the head.", show_default="width")
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="The golden model, or the accelerator's RTL, simulated.")
    ] = Backend.GOLDEN,
    cols: Annotated[
        int | None, typer.Option(help="With rtl: columns of the array.", show_default="16")
    ] = None,
) -> None:
    """Generate text losslessly with the draft model inside the weights, and report the speedup."""
    from speq.cli.generate import Request, run

    run(
        Request(
            model=model,
            prompt=prompt,
            speculative=mode is Decoding.SPEQ,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            encoded=encoded,
            rows=rows,
            draft_length=draft_length,
            threshold=threshold,
            choices=choices,
            raw=raw,
            group=group,
            split=split,
            width=width,
            head_width=head_width,
            rtl=backend is Backend.RTL,
            cols=cols,
        )
    )


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="A checkpoint's path, or an alias such as smollm2.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the report and the plots.")
    ] = Path("build/eval"),
    prompts: Annotated[
        Path | None, typer.Option(help="JSON file of prompts: kind to list.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts (story openings): no chat format.")
    ] = False,
    prompts_per_kind: Annotated[
        int | None, typer.Option(min=1, help="Only so many prompts of each kind.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per prompt.")] = 64,
    rows: Annotated[int, typer.Option(help="Rows of the array: tokens in a verify pass.")] = 8,
    choices: Annotated[int, typer.Option(help="Candidates per position of the tree.")] = 4,
    group: Annotated[int | None, typer.Option(help="As of encode.", show_default="64")] = None,
    split: Annotated[int | None, typer.Option(help="As of encode.", show_default="2")] = None,
    width: Annotated[int | None, typer.Option(help="As of encode.", show_default="4")] = None,
    head_width: Annotated[
        int | None, typer.Option(help="Draft bits of the head.", show_default="width")
    ] = None,
    encoded: Annotated[
        Path | None, typer.Option(help="Evaluate this file, written by speq encode.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Also compare formats and competitors.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Measure a model's draft on prompts of five kinds, with modelled speedups and plots."""
    from speq.cli.evaluate import Request, run

    run(
        Request(
            model=model,
            output=output,
            prompts=prompts,
            raw=raw,
            prompts_per_kind=prompts_per_kind,
            max_tokens=max_tokens,
            rows=rows,
            choices=choices,
            group=group,
            split=split,
            width=width,
            head_width=head_width,
            encoded=encoded,
            ablation=ablation,
            seed=seed,
        )
    )


@app.command("cycles")
def cycles_command(
    rows: Annotated[int, typer.Option(help="Rows of the array: tokens in a verify pass.")] = 8,
    cols: Annotated[int, typer.Option(help="Columns of the array: outputs in a tile.")] = 64,
    clock: Annotated[float, typer.Option(help="Clock in MHz.")] = 500.0,
    latency: Annotated[int, typer.Option(help="Latency of memory in cycles.")] = 48,
    context: Annotated[int, typer.Option(help="Positions in the KV cache.")] = 1024,
    acceptance: Annotated[
        list[float] | None,
        typer.Option(help="Share of drafted tokens accepted.", show_default="0.7, 0.8, 0.9"),
    ] = None,
) -> None:
    """Predict cycles, tokens per second and speedup for models of known dimensions."""
    from speq.cli.cycles import run

    run(rows, cols, clock, latency, context, acceptance or (0.7, 0.8, 0.9))


@app.command("bench")
def bench_command(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    only: Annotated[str, typer.Option(help="Run only the benchmark of this name.")] = "",
    seed: Seed = 0,
    liberty: Annotated[
        Path | None,
        typer.Option(envvar="LIBERTY", help="Standard-cell library (.lib, .lib.gz) for areas."),
    ] = None,
) -> None:
    """Measure speeds and sizes and compare them with their targets."""
    from speq.cli.bench import Settings, run

    run(json_file, only, Settings(seed, liberty))


class Event(StrEnum):
    """Where a window of `speq waves` can begin."""

    PROMPT = "prompt"
    DRAFT = "draft"
    VERIFY = "verify"
    STEP = "step"


@app.command("waves")
def waves_command(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's path, or an alias such as smollm2.")
    ] = "tiny",
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the recording and the layout.")
    ] = Path("build/waves"),
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "Once upon a time",
    rows: Annotated[int, typer.Option(help="Rows of the array: tokens in a verify pass.")] = 4,
    cols: Annotated[int, typer.Option(help="Columns of the array: outputs in a tile.")] = 8,
    draft_length: Annotated[
        int | None, typer.Option(help="Most tokens to draft.", show_default="rows - 1")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 8,
    start: Annotated[
        int | None, typer.Option(min=0, help="First cycle of the window.", show_default="--at")
    ] = None,
    at: Annotated[
        Event | None,
        typer.Option(help="The window begins where such a pass, or a step's end, is reported."),
    ] = None,
    nth: Annotated[int, typer.Option(min=1, help="With --at: which of them, from 1.")] = 1,
    cycles: Annotated[int, typer.Option(min=1, help="Cycles of the window.")] = 5000,
    array: Annotated[
        bool, typer.Option("--array", help="Also record the array's inside: much larger.")
    ] = False,
) -> None:
    """Record waves of the accelerator decoding, as FST, with a GTKWave layout of the signals that
    tell what it is doing."""
    from speq.cli.waves import Request, run

    run(
        Request(
            model=model,
            prompt=prompt,
            output=output,
            rows=rows,
            cols=cols,
            draft_length=draft_length,
            max_tokens=max_tokens,
            start=start,
            at=at,
            nth=nth,
            cycles=cycles,
            array=array,
        )
    )


def describe(error: Exception) -> str:
    """One line that says what went wrong, without line breaks."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, in place of Python's two with a source line."""
    print(f"speq: warning: {' '.join(str(message).split())}", file=sys.stderr)


def main() -> None:
    """Entry point of `speq`: exit code 1 and one line on stderr for an expected error.

    Usage errors exit with 2. With SPEQ_DEBUG set in the environment, the traceback is shown.
    """
    warnings.showwarning = show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("SPEQ_DEBUG"):
            raise
        print(f"speq: error: {describe(error)}", file=sys.stderr)
        sys.exit(1)
