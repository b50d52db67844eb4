# SPDX-License-Identifier: Apache-2.0
"""`speq generate`: lossless text, what goes where, and how it fails."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text

import speq.cli
from speq.cli.decoding import chosen_settings
from speq.cli.decoding_output import show, summary
from speq.cli.simulation import rtl_figures
from speq.host.accelerator_model import AcceleratorModel
from speq.host.session import memory_size
from speq.hw.control.register_map import COUNTERS
from speq.model.checkpoint import Model
from speq.model.encoded_file import EncodedModel, read_encoded, sha256, write_encoded
from speq.model.encoding import encode_linears
from speq.model.evaluation import encoded_costs
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings, Statistics, Step, generate
from speq.model.tokenizer import TextStream
from tests.model.drafted import pass_costs, randomly_scaled
from tests.model.small_models import overflowing, random_weights, small_config, write_gguf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
COUNT = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A GGUF file with a random model of 264 tokens."""
    config = small_config(tied_head=False, context=64)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return str(path)


@pytest.fixture
def speq_generate(checkpoint, monkeypatch, capsys):
    """Call `speq generate` with a prompt and arguments: exit code, output, errors."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it
    monkeypatch.delenv("SPEQ_DEBUG", raising=False)

    def call(*arguments: object, model: str = checkpoint) -> SimpleNamespace:
        command = ["speq", "generate", model, "--prompt", "hello", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            speq.cli.main()
        captured = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code or 0, out=captured.out, err=captured.err)

    return call


def test_speculative_text_is_that_of_fp16(speq_generate):
    plain = speq_generate("--mode", "fp16", "--max-tokens", COUNT)
    assert plain.code == 0, plain.err
    assert plain.out.endswith("\n") and len(plain.out) > COUNT / 2
    assert re.fullmatch(rf"{COUNT} tokens in .* \(golden model, FP16 token by token\)\n", plain.err)
    for options in (
        (),
        ("--rows", 16, "--threshold", 0.5, "--choices", 2),
        ("--split", 3, "--draft-length", 2),
        ("--group", 32, "--split", 0),
    ):
        made = speq_generate("--max-tokens", COUNT, *options)
        assert made.code == 0, made.err
        assert made.out == plain.out
        assert f"{COUNT} tokens in" in made.err
        assert re.search(r"acceptance: .*% of \d+ compared draft tokens", made.err)
        assert re.search(r"modelled speedup over FP16: \d\.\d\d \(\d+ draft passes at", made.err)
    short = speq_generate("--max-tokens", 4)
    assert plain.out.startswith(short.out[:-1])


@pytest.fixture(scope="module")
def overflowing_checkpoint(tmp_path_factory) -> str:
    """A model that cannot go on behind the fifth token that it decodes for "hello"."""
    config = small_config(tied_head=False, context=64)
    weights = {name: w.half() for name, w in random_weights(config, SEED).items()}
    path = str(tmp_path_factory.mktemp("overflow") / "random.gguf")

    def write(token: int, scale: float = 1.0) -> Model:
        model = Model("random", config, weights, tokenizer=None)
        model = overflowing(model, token, "block.0.down_proj", scale=scale)
        write_gguf(Path(path), config, {n: w.float() for n, w in model.weights.items()})
        return load_model(path)

    model = write(0, 2.0**-6)
    prompt = model.tokenizer.encode(model.tokenizer.chat("hello"))
    text = [t for step in generate(model, prompt, None, max_tokens=COUNT) for t in step.tokens]
    assert 0 not in prompt + text[:5] and text[4] not in prompt + text[:4]
    write(text[4])
    return path


def test_text_before_the_end_of_fp16s_range_is_shown(overflowing_checkpoint, speq_generate):
    """Then one line that says where, and exit code 1."""
    shown = []
    for options in (("--mode", "fp16"), ("--threshold", 0.5), ("--temperature", 1e-6)):
        made = speq_generate("--max-tokens", COUNT, *options, model=overflowing_checkpoint)
        assert made.code == 1
        figures, *_, error, empty = made.err.split("\n")
        assert figures.startswith("5 tokens in ") and not empty
        assert re.fullmatch(
            r"speq: error: NONFINITE: a result of block\.0\.down_proj is not finite at position "
            r"\d+, in the verify pass of step \d: .*",
            error,
        )
        shown.append(made.out)
    assert len(set(shown)) == 1 and len(shown[0]) > 1
    short = speq_generate("--mode", "fp16", "--max-tokens", 5, model=overflowing_checkpoint)
    assert short.code == 0 and short.out == shown[0]


def test_json_has_text_tokens_and_figures(speq_generate, checkpoint):
    text = speq_generate("--max-tokens", COUNT)
    made = speq_generate("--max-tokens", COUNT, "--json", "--seed", 7)
    assert (made.code, made.err) == (0, "")  # the figures are in the object
    (line,) = made.out.splitlines()
    found = json.loads(line)
    assert found["text"] + "\n" == text.out
    assert (found["version"], found["model"]) == (version("speq"), checkpoint)
    assert (found["backend"], found["mode"], found["seed"]) == ("golden", "speq", 7)
    tokenizer = load_model(checkpoint).tokenizer
    assert found["prompt_ids"] == tokenizer.encode_chat("hello") and found["known"] == 0
    assert len(found["token_ids"]) == COUNT and found["stop"] == "max tokens"
    settings = found["settings"]
    assert (settings["rows"], settings["threshold"], settings["max_tokens"]) == (8, 2.0, COUNT)
    assert settings["sampling"] is settings["encoded"] is settings["system"] is None
    steps, totals = found["steps"], found["totals"]
    assert [t for step in steps for t in step["tokens"]] == found["token_ids"]
    for step in steps:
        assert step["committed"] == len(step["tokens"])
        assert step["committed"] <= 1 + step["accepted"] + step["alternate_hit"]
        assert step["accepted"] <= step["drafted"]
    for name, part in (
        ("draft_passes", "drafted"),
        *((name, name) for name in ("accepted", "committed", "alternates")),
        ("alternate_hits", "alternate_hit"),
    ):
        assert totals[name] == sum(step[part] for step in steps)
    assert totals["verify_passes"] == len(steps)
    cost = totals["draft_passes"] * totals["draft_cost"] + len(steps) * totals["verify_cost"]
    assert totals["speedup"] == pytest.approx(COUNT / cost)
    assert found["counters"] is found["error"] is None


def test_json_of_plain_and_of_sampled_decoding(speq_generate):
    plain = json.loads(speq_generate("--mode", "fp16", "--json", "--max-tokens", 3).out)
    assert plain["totals"]["match_rate"] is plain["totals"]["speedup"] is None
    assert "threshold" not in plain["settings"]
    options = ("--temperature", 1, "--top-k", 5, "--seed", 3)
    sampled = json.loads(speq_generate(*options, "--json", "--max-tokens", 3).out)
    assert sampled["settings"]["sampling"] == {
        "temperature": 1.0,
        "top_k": 5,
        "top_p": 1.0,
        "min_p": 0.0,
        "sampler": "gumbel",
    }


def test_json_says_why_decoding_ended(speq_generate, overflowing_checkpoint, monkeypatch):
    made = speq_generate("--json", "--max-tokens", COUNT, model=overflowing_checkpoint)
    found = json.loads(made.out)
    assert (made.code, found["stop"], len(found["token_ids"])) == (1, "error", 5)
    assert found["error"] and made.err == f"speq: error: {found['error']}\n"
    first = json.loads(speq_generate("--json", "--max-tokens", COUNT).out)["token_ids"]
    assert first[2] not in first[:2]

    def stopping(*arguments: object, **options: object) -> Model:
        model = load_model(*arguments, **options)
        return replace(model, tokenizer=replace(model.tokenizer, stop_ids=frozenset([first[2]])))

    monkeypatch.setattr("speq.model.loaders.load_model", stopping)
    found = json.loads(speq_generate("--json", "--max-tokens", COUNT).out)
    assert (found["stop"], found["token_ids"]) == ("stop token", first[:3])


def test_quiet_leaves_the_results_alone(checkpoint, speq_command, tmp_path):
    arguments = ("generate", checkpoint, "--prompt", "hello", "--max-tokens", 5)
    usual = speq_command(*arguments)
    assert len(usual.err) >= 2
    quiet = speq_command("--quiet", *arguments)
    assert (quiet.code, quiet.out, quiet.err) == (0, usual.out, [])
    verbose = speq_command("-v", *arguments)
    assert verbose.out == usual.out and len(verbose.err) > len(usual.err)
    said = "\n".join(verbose.err)
    for part in (f"reading {checkpoint}, ", version("speq"), torch.__version__, "seed 0", "Format"):
        assert part in said
    encode = ("encode", checkpoint, "--fixed", "--force", "-o", tmp_path / "x")
    assert any("encoding" in line for line in speq_command(*encode).err)
    quiet = speq_command("-q", *encode)
    assert quiet.err == [] and "bits per weight" in quiet.out
    failed = speq_command("-q", "generate", "absent.gguf", "--prompt", "hello")
    assert failed.code == 1 and failed.err[0].startswith("speq: error: absent.gguf")
    both = speq_command("-q", "-v", *arguments)
    assert both.code == 1 and "--verbose and --quiet exclude each other" in both.err[0]


def test_long_prompts_are_refused_before_anything_is_encoded(
    speq_generate, encoded_file, monkeypatch
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this is work")

    monkeypatch.setattr("speq.model.encoding.encode", refuse)
    monkeypatch.setattr(EncodedModel, "check_bits", refuse)
    monkeypatch.setattr("speq.cli.decoding.simulated_board", refuse)
    for options in ((), ("--backend", "rtl"), ("--encoded", encoded_file)):
        made = speq_generate("--prompt", "x" * 70, "--raw", *options)
        assert made.code == 1 and "prompt has 70 tokens; expected 1 to 63" in made.err


def test_sampled_text_depends_on_the_seed(speq_generate):
    def text(seed: int) -> str:
        made = speq_generate(
            *("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--seed", seed),
            *("--max-tokens", COUNT),
        )
        assert made.code == 0, made.err
        assert f"seed {seed}" in made.err
        return made.out

    assert text(1) == text(1) != text(2)


def test_sampled_text_is_the_same_in_both_modes(speq_generate):
    sampling = ("--temperature", 0.8, "--min-p", 0.02, "--seed", 7, "--max-tokens", COUNT)
    modes = (("--mode", "fp16"), (), ("--rows", 4, "--choices", 2), ("--reranked", 3))
    texts = [speq_generate(*sampling, *options) for options in modes]
    assert all(made.code == 0 for made in texts), texts
    assert len({made.out for made in texts}) == 1


def test_wrong_requests_are_refused_in_one_line(speq_generate, tmp_path):
    for options, message in (
        (("--top-k", 5), "top-k, top-p and min-p need sampling"),
        (("--top-p", 0.5), "top-k, top-p and min-p need sampling"),
        (("--temperature", -1), "temperature is -1.0"),
        (("--temperature", 1, "--top-p", 0), "top-p is 0.0"),
        (("--temperature", 1, "--min-p", 2), "min-p is 2.0"),
        (("--min-p", 0.1), "top-k, top-p and min-p need sampling"),
        (("--rows", 0), "rows is 0"),
        (("--rows", 4, "--draft-length", 4), "draft length is 4; expected 0 to rows - 1 = 3"),
        (("--split", 7), "split is 7; allowed values are 0, 1, 2, 3"),
        (("--prompt", "x" * 70, "--raw"), "prompt has 70 tokens; expected 1 to 63"),
        (("--prompt", "", "--raw"), "prompt has 0 tokens"),
    ):
        made = speq_generate(*options)
        assert made.code == 1
        assert made.err.startswith("speq: error: ") and message in made.err
        assert made.err.count("\n") == 1 and not made.out
    missing = speq_generate(model=str(tmp_path / "none.gguf"))
    assert missing.code == 1 and "none.gguf" in missing.err
    assert speq_generate("--mode", "int8").code == 2


FILE_SETTINGS = {
    "chain": Settings(6, 3, 0.5, choices=1),
    "alternates": Settings(6, 4, 0.25, choices=3),
}


@pytest.fixture(scope="module")
def encoded_file(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with a head of 200 outputs, and settings."""
    model = load_model(checkpoint)
    rng = np.random.default_rng(SEED)
    tensors = randomly_scaled(model, rng, FormatConfig(32), drafted_outputs=200)
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    path = tmp_path_factory.mktemp("encoded") / "model.safetensors"
    write_encoded(path, EncodedModel(model.name, tensors, digests, FILE_SETTINGS))
    return path


def test_text_of_an_encoded_file_is_that_of_fp16(speq_generate, encoded_file, monkeypatch):
    plain = speq_generate("--mode", "fp16", "--max-tokens", COUNT)
    used = []

    def watched(*arguments, settings, **options):
        used.append(settings)
        return generate(*arguments, settings=settings, **options)

    monkeypatch.setattr("speq.host.session.generate", watched)
    costs = pass_costs(read_encoded(encoded_file).tensors)
    for options, settings in (
        ((), FILE_SETTINGS["alternates"]),
        (("--choices", 1), FILE_SETTINGS["chain"]),
        (("--threshold", 1, "--rows", 8), Settings(8, None, 1.0, choices=3)),
    ):
        made = speq_generate("--encoded", encoded_file, "--max-tokens", COUNT, *options)
        assert made.code == 0, made.err
        assert made.out == plain.out
        assert used.pop() == settings
        assert f"at {costs[0]:.4f}, " in made.err and f"at {costs[1]:.4f} of a" in made.err
    sampled = ("--temperature", 1.0, "--max-tokens", 8)
    assert speq_generate("--encoded", encoded_file, *sampled).code == 0
    plainly = speq_generate("--encoded", encoded_file, "--mode", "fp16")
    assert plainly.code == 1 and "--encoded is not used with --mode fp16" in plainly.err


def test_settings_come_from_the_file_and_the_options():
    def settings(file: bool = True, **given: object) -> Settings:
        options = dict.fromkeys(("rows", "draft_length", "threshold", "choices")) | given
        contents = SimpleNamespace(settings=FILE_SETTINGS) if file else None
        return chosen_settings(contents, **options)

    assert settings() == FILE_SETTINGS["alternates"]
    assert settings(choices=1) == FILE_SETTINGS["chain"]
    assert settings(choices=2) == Settings(6, 4, 0.25, choices=2)
    assert settings(rows=6) == FILE_SETTINGS["alternates"]
    assert settings(rows=3) == Settings(3, None, 0.25, choices=3)
    assert settings(draft_length=0, threshold=2.5) == Settings(6, 0, 2.5, choices=3)
    assert settings(file=False) == Settings(8, None, 2.0, choices=4)
    assert settings(file=False, rows=4, threshold=0.0) == Settings(4, None, 0.0, choices=4)
    uncalibrated = SimpleNamespace(settings={})
    options = {"rows": 5, "draft_length": None, "threshold": None, "choices": None}
    assert chosen_settings(uncalibrated, **options) == Settings(5, None, 2.0, choices=4)
    with pytest.raises(ValueError, match="draft length is 6"):
        settings(draft_length=6)


def test_encoded_files_that_cannot_be_used_are_refused(
    speq_generate, encoded_file, checkpoint, tmp_path
):
    for option in ("group", "split"):
        made = speq_generate("--encoded", encoded_file, f"--{option}", 5)
        assert made.code == 1 and f"--{option} and --encoded exclude each other" in made.err
        assert made.err.count("\n") == 1 and not made.out
    config = load_model(checkpoint).config
    other = tmp_path / "other.gguf"
    write_gguf(other, config, random_weights(config, SEED + 1))
    made = speq_generate("--encoded", encoded_file, model=str(other))
    assert made.code == 1 and "block.0.q_proj differs" in made.err and str(encoded_file) in made.err
    part = tmp_path / "part.safetensors"
    part.write_bytes(encoded_file.read_bytes()[:1000])
    for path in (part, tmp_path / "absent.safetensors"):
        made = speq_generate("--encoded", path)
        assert made.code == 1 and str(path) in made.err
        assert made.err.count("\n") == 1 and not made.out


def test_every_linear_layer_is_encoded_and_counted(checkpoint):
    model = load_model(checkpoint)
    encoded = encode_linears(model)
    assert len(encoded) == 2 * 7 + 1
    for name, tensor in encoded.items():
        assert torch.equal(tensor.decode(), model.linear_weight(name))
    c = model.config
    layers = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)] * c.blocks
    plain = sum(o * k for o, k in layers) + c.vocab_size * 64
    rows = 272  # the head's 264 in whole tiles
    groups = sum(o * -(-k // 64) for o, k in layers) + rows
    draft_bits = sum(4 * o * k for o, k in layers) + 4 * rows * 64 + 8 * groups
    stored_bits = sum(16 * o * k for o, k in layers) + 16 * rows * 64 + 8 * groups
    costs = encoded_costs(model.config, encoded).relative
    assert costs == (draft_bits / (16 * plain), stored_bits / (16 * plain))


def test_text_is_streamed_in_whole_characters(checkpoint):
    tokenizer = load_model(checkpoint).tokenizer
    text = "hello, tëst → 😀 hello\n\ndone"
    prompt, ids = tokenizer.encode("héllo "), tokenizer.encode(text)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text and stream.flush() == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    smile = tokenizer.encode("😀")
    assert [stream.push(token) for token in smile[:-1]] == [""] * 3
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_origins_of_tokens():
    logits = torch.zeros(4, 1)

    def kinds(tokens: list[int], accepted: int, hit: bool) -> list[str]:
        return Step(tokens, logits[: len(tokens)], 3, accepted, 4, hit, [0.0] * 3).origins

    assert kinds([5, 6, 7], 2, False) == ["draft", "draft", "target"]
    assert kinds([5, 6, 7], 1, True) == ["draft", "alternate", "target"]
    assert kinds([5], 0, False) == ["target"]
    assert kinds([5, 6], 2, False) == ["draft", "draft"]  # cut by a stop token


def test_terminals_get_colours_and_no_escape_codes_of_the_model():
    def shown(text: str, origin: str | None) -> str:
        file = io.StringIO()
        terminal = {"force_terminal": True, "color_system": "standard", "width": 20}
        show(Console(file=file, soft_wrap=True, highlight=False, **terminal), text, origin)
        return file.getvalue()

    outputs = {shown("word", origin) for origin in ("draft", "alternate", "target", None)}
    assert len(outputs) == 4 and "word" in outputs
    assert all(Text.from_ansi(output).plain == "word" for output in outputs)
    hostile = shown("a\x1b[2Jb [red]c", None)
    assert "\x1b" not in hostile and "[red]c" in hostile
    long = "x " * 50
    assert shown(long, None) == long  # no line breaks of its own


def test_summary_of_short_runs():
    statistics = Statistics()
    statistics.add(Step([3], torch.zeros(1, 1), 0, 0, 0, False, []))
    lines = summary(statistics, 2.0, (0.25, 1.0))
    assert lines[0].startswith("1 tokens in 2.0 s, 0.50 tokens/s")
    assert len(lines) == 2 and "modelled speedup over FP16: 1.00" in lines[1]


@pytest.fixture
def accelerator(monkeypatch) -> list:
    """The functional model in place of the simulation; the configurations that were asked for."""
    configs = []

    class Simulated(AcceleratorModel):
        def cycles(self) -> int:
            return 0

    def board(model: object, encoded: object, config: object, capacity: int) -> Simulated:
        configs.append(config)
        return Simulated(config, memory_size(config, model, encoded, capacity))

    monkeypatch.setattr("speq.cli.decoding.simulated_board", board)
    return configs


def test_the_accelerators_text_is_the_golden_models(speq_generate, accelerator, encoded_file):
    rtl = ("--backend", "rtl", "--max-tokens", COUNT)
    plain = speq_generate("--mode", "fp16", "--max-tokens", COUNT)
    for options in (
        (),
        ("--mode", "fp16"),
        ("--rows", 4, "--cols", 8, "--choices", 2, "--lanes", 4),
        ("--encoded", encoded_file, "--rows", 6),
    ):
        made = speq_generate(*rtl, *options)
        assert made.code == 0, made.err
        assert made.out == plain.out
        assert f"{COUNT} tokens in" in made.err and "(RTL simulation" in made.err
        assert "cycles per token, with the prompt's: 0\n" in made.err
        assert "simulation: 0 cycles in" in made.err
    arrays = [(config.engine.rows, config.engine.cols, config.lanes) for config in accelerator]
    assert arrays == [(8, 16, 8), (8, 16, 8), (4, 8, 4), (6, 16, 8)]
    assert accelerator[-1].engine.format == FormatConfig(32)
    assert {config.head_inputs for config in accelerator} == {64}


def test_figures_of_the_accelerator():
    counters = dict.fromkeys(COUNTERS, 0) | {
        "COMMITTED": 4,
        "CYCLES": 9000,
        "HOST_CYCLES": 1000,
        "COMPUTE_CYCLES": 6000,
        "VERIFY_CYCLES": 5000,
        "ARGMAX_CYCLES": 2222,
        "GROUP_STALLS": 44,
        "VECTOR_CYCLES": 4000,
        "VECTOR_STALLS": 400,
    }
    assert rtl_figures(counters, 50_000, 2.5) == [
        "cycles per token, with the prompt's: 2,000 (the array computes in 75.0%)",
        "  by descriptor: draft 0, verify 1,250, bypass 0, attention 0, argmax 556, vector 1,000",
        "  stalls: weight 0, group 11, activation 0, result 0, vector 100",
        "simulation: 50,000 cycles in 2.5 s, 20,000 cycles/s",
    ]
    assert rtl_figures(dict.fromkeys(COUNTERS, 0), 1, 1.0) == []


def test_requests_that_the_accelerator_cannot_serve(speq_generate, accelerator):
    for options, message in (
        (
            ("--backend", "rtl", "--temperature", 1, "--top-k", 5),
            "samples with temperature and min-p",
        ),
        (("--backend", "rtl", "--temperature", 1, "--sampler", "rsd"), "the sampler gumbel"),
        (("--cols", 8), "--cols is of the simulated array: give --backend rtl"),
        (("--lanes", 4), "--lanes is of the simulated array: give --backend rtl"),
        (("--backend", "rtl", "--cols", 12), "cols is 12"),
        (("--backend", "rtl", "--lanes", 6), "lanes is 6; allowed are powers of two from 4 to 16"),
        (("--backend", "rtl", "--lanes", 0), "lanes is 0; only an accelerator with a vector unit"),
        (
            ("--backend", "rtl", "--lanes", 32),
            "lanes is 32; allowed are powers of two from 4 to 16",
        ),
        (("--backend", "rtl", "--choices", 9), "choices is 9; this accelerator ranks 1 to 8"),
        (("--reranked", 9), "reranked is 9; expected 0 (none) to 8"),
        (("--mode", "fp16", "--reranked", 8), "--reranked is not used with --mode fp16"),
    ):
        made = speq_generate(*options)
        assert made.code == 1 and message in made.err, made.err
        assert made.err.count("\n") == 1 and not made.out
