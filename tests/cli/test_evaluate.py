# SPDX-License-Identifier: Apache-2.0
"""`speq eval`: the report, the plots, and how it fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from speq.cli import plots
from speq.cli.eval_report import as_json, number, percent
from speq.cli.tables import figure_table, show
from speq.host.session import Session
from speq.model import ablation
from speq.model.checkpoint import linear_names
from speq.model.cycles import uniform_formats
from speq.model.encoded_file import EncodedModel, sha256, write_encoded
from speq.model.encoding import encode_linears
from speq.model.evaluation import THRESHOLDS, Acceptance, Estimate, counted_costs, encoded_costs
from speq.model.format import encode
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.prompts import shipped_prompts
from speq.model.settings import Policy, Settings
from speq.model.speculation import Statistics
from tests.model.drafted import pass_costs
from tests.model.small_models import VOCABULARY, random_weights, small_config, write_gguf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
PLOTS = ("acceptance", "exponents", "speedup")
QUICK = ("--prompts-per-kind", 1, "--max-tokens", 6, "--rows", 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A GGUF file with a random model of 264 tokens and a chat format."""
    config = small_config(tied_head=False, context=512)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return str(path)


@pytest.fixture
def speq_eval(speq_command, checkpoint):
    """Call `speq eval` on the small model."""

    def call(*arguments: object, model: str = checkpoint) -> SimpleNamespace:
        return speq_command("eval", model, *arguments)

    return call


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


RESULTS = ["chain", "alternates", "product rule", "guesses", "policy"]


def settings_of(report: dict, name: str) -> Settings:
    """The settings of a result."""
    values = report["results"][name]["settings"]
    return Settings(**{**values, "policy": Policy(**values["policy"])})


def test_report_and_plots(speq_eval, checkpoint, tmp_path):
    made = speq_eval(*QUICK, "--group", 32, "--seed", 3, "-o", tmp_path / "out")
    assert made.code == 0, made.err
    names = {f"{plot}.{kind}" for plot in PLOTS for kind in ("png", "svg")} | {"report.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert [file.name for file in tmp_path.iterdir()] == ["out"]  # nothing temporary is left
    for plot in PLOTS:
        with Image.open(tmp_path / "out" / f"{plot}.png") as image:
            image.load()
            assert min(image.size) > 300
        ElementTree.parse(tmp_path / "out" / f"{plot}.svg")

    report = read(tmp_path / "out")
    assert report["version"] == 4 and report["model"]["name"] == Path(checkpoint).name
    for file in (tmp_path / "out").iterdir():  # which may be moved
        for folder in (tmp_path, Path(checkpoint).parent, Path.cwd()):
            assert str(folder).encode() not in file.read_bytes()
    [formats] = report["settings"]["draft"]["formats"]
    assert report["settings"]["seed"] == 3
    assert formats == {"format": {"group": 32, "split": 2}, "tensors": 15}
    one_each = dict.fromkeys(shipped_prompts("evaluation"), 1)
    assert report["prompts"] == {"calibration": one_each, "evaluation": one_each}
    config = small_config(tied_head=False, context=512)
    formats = uniform_formats(config, FormatConfig(32))
    assert report["costs"]["relative"] == list(counted_costs(config, formats).relative)
    assert list(report["results"]) == RESULTS
    for name in RESULTS:
        settings = settings_of(report, name)
        assert settings.choices == (1 if name == "chain" else 4)
        assert settings.policy.guesses == (name in ("guesses", "policy"))
        assert settings.policy.guess_limit == 0 or name == "policy"
        figures = report["results"][name]["figures"]
        assert list(figures) == [*one_each, "all"]
        assert figures["all"]["prompts"] == 5
        assert figures["all"]["tokens"] == sum(figures[kind]["tokens"] for kind in one_each)
        speed = figures["all"]["speedup"]
        assert speed["low"] <= speed["value"] <= speed["high"]
        for kind in [*one_each, "all"]:
            assert kind in made.out
        assert f"{speed['value']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})" in made.out
        if name in ("chain", "alternates"):
            assert report["curves"][name][0]["values"] == [1, 2, 3]
            assert report["curves"][name][1]["values"] == list(THRESHOLDS)
    assert list(report["curves"]) == ["chain", "alternates"]
    (context,) = report["contexts"]  # the model has no more than 512 positions
    assert context["context"] == 80
    for estimate in (context["bytes"], context["cycles"]):
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert f"{estimate['value']:.2f} ({estimate['low']:.2f}-{estimate['high']:.2f})" in made.out
    assert (
        np.sum(report["exponents"]["counts"])
        == sum(o * k for o, k in [(264, 64)] + 2 * [(64, 64), (64, 64), (32, 64), (32, 64)])
        + 2 * 3 * 96 * 64
    )
    assert report["ablation"] is None
    # Tokens that come for a gigabyte of weights.
    plain = 1e9 / report["costs"]["plain"]
    best = report["results"]["policy"]["figures"]["all"]["speedup"]["value"]
    for rate in (plain, plain * best):
        assert f"{rate:.4g}" in made.out.split()
    assert "the best on 5 other prompts" in made.out


def test_the_same_options_give_the_same_files(speq_eval, tmp_path):
    for folder in ("a", "b"):
        assert speq_eval(*QUICK, "-o", tmp_path / folder).code == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("reranked", [0, 3])
def test_figures_are_those_of_real_speculation(speq_eval, checkpoint, tmp_path, reranked):
    """The exact golden model decodes the same prompts with the chosen settings."""
    prompts = {"chat": ["hello hell", "the hello"], "other": ["a b c d"]}
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(prompts))
    arguments = ("--prompts", file, "--max-tokens", 12, "--split", 1, "--prompts-per-kind", 2)
    arguments += ("--reranked", reranked)
    made = speq_eval(*arguments, "-o", tmp_path / "out")
    assert made.code == 0, made.err
    report = read(tmp_path / "out")
    model = load_model(checkpoint)
    session = Session(model, encode_linears(model, FormatConfig(split=1)))
    for name in RESULTS:
        settings = settings_of(report, name)
        assert settings.reranked == reranked
        total = Statistics()
        for prompt in (prompt for texts in prompts.values() for prompt in texts):
            ids = model.tokenizer.encode(model.tokenizer.chat(prompt))
            stop_ids = model.tokenizer.stop_ids
            for step in session.golden(ids, max_tokens=12, settings=settings, stop_ids=stop_ids):
                total.add(step)
        figures = report["results"][name]["figures"]["all"]
        assert figures["tokens"] == total.committed
        assert figures["tokens_per_pass"] == pytest.approx(total.tokens_per_pass)
        assert figures["acceptance_length"] == total.accepted / total.verify_passes
        relative = report["costs"]["relative"]
        assert figures["speedup"]["value"] == pytest.approx(total.speedup(*relative))
    check_samples(report, session, prompts)


def check_samples(report: dict, session: Session, prompts: dict[str, list[str]]) -> None:
    """The first text of each kind, step by step as the golden model takes them."""
    tokenizer = session.model.tokenizer
    assert [sample["kind"] for sample in report["samples"]] == [*prompts]
    settings = settings_of(report, "policy")
    for sample in report["samples"]:
        assert sample["prompt"] == prompts[sample["kind"]][0]
        ids = tokenizer.encode_chat(sample["prompt"])
        steps = [
            *session.golden(ids, max_tokens=12, settings=settings, stop_ids=tokenizer.stop_ids)
        ]
        assert [step["tokens"] for step in sample["steps"]] == [step.tokens for step in steps]
        for shown, step in zip(sample["steps"], steps, strict=True):
            assert shown["origins"] == step.origins
            assert len(shown["refused"]) == step.drafted - step.accepted
        texts = [text for step in sample["steps"] for text in step["texts"]]
        assert "".join(texts) == tokenizer.decode([t for step in steps for t in step.tokens])


def test_raw_prompts_are_story_openings(speq_eval, tmp_path):
    made = speq_eval("--raw", *QUICK, "-o", tmp_path / "out")
    assert made.code == 0, made.err
    report = read(tmp_path / "out")
    assert report["settings"]["raw"] is True
    assert report["prompts"] == {"calibration": {"opening": 1}, "evaluation": {"opening": 1}}


def test_models_without_a_chat_format_get_story_openings(speq_eval, tmp_path):
    config = small_config(tied_head=False, context=512, vocab_size=VOCABULARY["pieces"])
    path = tmp_path / "base.gguf"
    write_gguf(path, config, random_weights(config, SEED), pieces=True)
    made = speq_eval(*QUICK, "-o", tmp_path / "out", model=path)
    assert made.code == 0, made.err
    assert read(tmp_path / "out")["settings"]["raw"] is True


def test_encoded_file(speq_eval, checkpoint, tmp_path):
    """With what the optimiser may do: a head of which half is drafted, and tokens re-ranked."""
    model = load_model(checkpoint)
    weights = {name: model.linear_weight(name) for name in linear_names(model.config)}
    encoded = {
        name: encode(weight, FormatConfig(split=1), name=name) for name, weight in weights.items()
    }
    encoded["head"] = encode(weights["head"], FormatConfig(), drafted_outputs=128)
    settings = {name: Settings(4, reranked=3) for name in ("chain", "alternates")}
    digests = {name: sha256(weight) for name, weight in weights.items()}
    file = tmp_path / "model.safetensors"
    write_encoded(file, EncodedModel(model.name, encoded, digests, settings))

    made = speq_eval(*QUICK, "--encoded", file, "-o", tmp_path / "out")
    assert made.code == 0, made.err
    report = read(tmp_path / "out")
    draft = report["settings"]["draft"]
    assert draft["drafted_outputs"] == 128 and report["settings"]["reranked"] == 3
    assert draft["encoded"] == file.name
    assert [entry["tensors"] for entry in draft["formats"]] == [14, 1]
    assert report["costs"]["relative"] == list(encoded_costs(model.config, encoded, 3).relative)
    assert report["results"]["alternates"]["settings"]["reranked"] == 3
    made = speq_eval(*QUICK, "--encoded", file, "--reranked", 0, "-o", tmp_path / "out")
    assert read(tmp_path / "out")["costs"]["relative"] == list(pass_costs(encoded))

    other = tmp_path / "other.gguf"
    write_gguf(other, model.config, random_weights(model.config, SEED + 1))
    made = speq_eval(*QUICK, "--encoded", file, "-o", tmp_path / "new", model=other)
    assert made.code == 1
    assert f"{file}: it is not of {other}" in made.err[-1]
    made = speq_eval(*QUICK, "--encoded", file, "--split", 1, "-o", tmp_path / "new")
    assert made.code == 1 and "--split and --encoded exclude each other" in made.err[-1]
    assert not (tmp_path / "new").exists()


def test_ablation(speq_eval, tmp_path, monkeypatch):
    """A few of its rows, one of each sort; the others are as many more drafts. All tables fit lines
    of 80 characters: long names get several, and no word is cut."""
    rows = [row for row in ablation.ROWS if row.draft in ("split 2", "half", "INT4", "tender4")]
    monkeypatch.setattr(ablation.run_ablation, "__defaults__", (rows, ("tender4",), lambda _: None))
    monkeypatch.setenv("COLUMNS", "80")
    made = speq_eval(*QUICK, "--ablation", "-o", tmp_path / "out")
    assert made.code == 0, made.err
    assert {f"ablation.{kind}" for kind in ("png", "svg")} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    report = read(tmp_path / "out")["ablation"]
    assert [entry["row"]["name"] for entry in report["rows"]] == [row.name for row in rows]
    assert report["rows"][0]["row"]["prototype"] == [0.718, 1.55]
    assert [entry["name"] for entry in report["lossy"]] == ["tender4"]
    assert "71.8%" in made.out and "1.55" in made.out and "tender4" in made.out
    assert "…" not in made.out
    assert max(map(len, made.out.splitlines()[:-1])) <= 80  # the last names the folder
    assert {word for row in rows for word in row.name.split()} <= set(made.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", 1), "rows is 1; speculation needs at least 2"),
        (("--choices", 0), "choices is 0"),
        (("--choices", 265), "choices is 265; the model has 264 tokens"),
        (("--split", 7), "split is 7"),
        (("--group", 65), "group is 65"),
        (("--prompts", "missing.json"), "missing.json: No such file"),
        (("--encoded", "missing.safetensors"), "missing.safetensors"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    speq_eval, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    made = speq_eval(*QUICK, *arguments, "-o", tmp_path / "some" / "out")
    assert made.code == 1
    assert made.err[0].startswith("speq: error: ") and len(made.err) == 1
    assert message in made.err[-1]
    assert made.out == ""
    assert list(tmp_path.iterdir()) == []


def test_calibration_prompts_are_not_evaluated(speq_eval, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"chat": [shipped_prompts("calibration")["math"][2]]}))
    made = speq_eval(*QUICK, "--prompts", file, "-o", tmp_path / "out")
    assert made.code == 1
    assert "is one of the prompts on which settings are chosen: take it out" in made.err[-1]
    assert not (tmp_path / "out").exists()


def test_output_must_be_a_folder(speq_eval, tmp_path):
    (tmp_path / "out").write_text("kept")
    made = speq_eval(*QUICK, "-o", tmp_path / "out")
    assert made.code == 1 and "out is not a folder" in made.err[-1]
    assert (tmp_path / "out").read_text() == "kept"


def test_any_name_makes_a_title(tmp_path):
    """A name that would be a broken formula, in a long path."""
    acceptance = Acceptance([2, 1], [0.5, 0.5], {2: [1.0, 1.0]}, [0.5, float("nan")])
    figure = plots.acceptance_plot(acceptance, "/some/folder/a$b_{$")
    for file in plots.save(figure, tmp_path, "plot"):
        assert file.stat().st_size > 1000
    assert "folder" not in (tmp_path / "plot.svg").read_text()


def test_values_for_json():
    value = {"a": (1, float("nan")), 2: np.arange(3), "e": Estimate(1.0, float("inf"), 2.0)}
    assert as_json(value) == {
        "a": [1, None],
        "2": [0, 1, 2],
        "e": {"value": 1.0, "low": None, "high": 2.0},
    }
    assert (percent(float("nan")), percent(0.1234), percent(None)) == ("-", "12.3%", "-")
    assert (number(None), number(float("nan")), number(1.234)) == ("-", "-", "1.23")


def test_long_words_make_tables_wider(capsys, monkeypatch):
    """As long as they are names: none is cut."""
    monkeypatch.setenv("COLUMNS", "40")
    table = figure_table("", "kind", "one figure", "another figure")
    table.add_row("some_kind_that_is_longer_than_any_other x", "1.25", "7")
    show(table)
    lines = capsys.readouterr().out.splitlines()
    assert "some_kind_that_is_longer_than_any_other" in lines[2].split()
    assert lines[0].split() == ["kind", "one", "figure", "another", "figure"]


def test_names_in_tables_are_plain_text(capsys):
    """Whatever would be markup elsewhere."""
    table = figure_table("", "kind", "figure")
    table.add_row("[red]kind[/]", "1.25")
    table.add_row("\\[x]", "2.5")
    show(table, "[bold]line")
    out = capsys.readouterr().out
    assert all(text in out for text in ("[red]kind[/]", "\\[x]", "[bold]line"))
