# SPDX-License-Identifier: Apache-2.0
"""`import speq`: its names, what they cost, and what its functions do."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import speq
from speq.hw.verilog import generate_verilog
from speq.model.loaders import load_model
from speq.model.speculation import generate
from speq.sim import builder
from tests.model.small_models import random_weights, small_config, write_gguf
from tests.test_project import ROOT

SEED = int(os.environ.get("SPEQ_SEED", "0"))
COUNT = 20
#: Python blocks of the manual.
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/api.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> speq.Model:
    """A random model of 264 tokens, two blocks and a head of its own."""
    config = small_config(tied_head=False, context=64)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return speq.load(path)


def run(*arguments: str) -> str:
    """What Python prints, called with these arguments."""
    made = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


# Names.


def test_the_three_lists_of_names_agree() -> None:
    """What a type checker sees is what is loaded."""
    (guarded,) = (
        node
        for node in ast.parse((ROOT / "api/__init__.py").read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == speq._PLACES
    assert {*speq.__all__} == {*seen, "__version__"}
    assert set(speq.__all__) <= set(dir(speq))


def test_every_name_is_what_it_says() -> None:
    for name, (module, attribute) in speq._PLACES.items():
        assert getattr(speq, name) is getattr(import_module(module), attribute)
        assert getattr(speq, name).__doc__, f"speq.{name} has no docstring"
        assert f"speq.{name}" in (ROOT / "docs/api.md").read_text(), f"docs/api.md lacks {name}"
    assert speq.__version__ == version("speq")
    with pytest.raises(AttributeError, match="module 'speq' has no attribute 'nothing'"):
        _ = speq.nothing


def test_hardware_is_configured_without_torch(tmp_path) -> None:
    code = (
        "import speq, sys; config = speq.EngineConfig(rows=1, cols=2, max_k=16); "
        f"print(speq.build_verilog(config, {str(tmp_path / 'engine.v')!r})[0].name); "
        "print(*{'torch', 'numpy'} & {*sys.modules})"
    )
    assert run("-c", code).split() == ["engine.v"]
    expected, _ = generate_verilog(speq.EngineConfig(rows=1, cols=2, max_k=16))
    assert (tmp_path / "engine.v").read_text() == expected
    names = {f"engine.{ending}" for ending in ("v", "json", "core", "vlt")}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_python_m_speq_is_the_command_line() -> None:
    assert run("-m", "speq", "--version") == f"speq {speq.__version__}\n"


# The manual.


def test_the_manual_is_right(tmp_path, monkeypatch, capsys) -> None:
    """Its examples run as they are written, one behind the other."""
    # Builds stay where all tests have theirs.
    monkeypatch.setattr(builder, "BUILD_ROOT", builder.BUILD_ROOT.resolve())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/api.md, block {number}", "exec", dont_inherit=True), names)
    assert len(BLOCKS) > 5
    assert capsys.readouterr().out


# Text.


def test_text_is_the_same_however_it_is_made(model) -> None:
    encoded = speq.encode(model)
    plain = speq.generate(model, "hello", max_tokens=COUNT)
    assert len(plain.tokens) == COUNT and {*plain.origins} == {"target"}
    assert plain.text == model.tokenizer.decode(plain.tokens) and plain.counters is None
    session = speq.Session(model, encoded.tensors)
    settings = speq.Settings(rows=6, draft_length=2)
    for arguments in ((model, "hello", encoded), (session, "hello")):
        drafted = speq.generate(*arguments, max_tokens=COUNT, settings=settings)
        assert (drafted.tokens, drafted.text) == (plain.tokens, plain.text)
        assert len(drafted.steps) < COUNT and drafted.statistics.committed == COUNT
        assert drafted.origins.count("draft") == drafted.statistics.accepted > 0
        assert drafted.origins.count("alternate") == drafted.statistics.alternate_hits
        assert max(step.drafted for step in drafted.steps) == 2
    ids = model.tokenizer.encode_chat("hello")
    assert drafted.prompt == ids
    assert speq.generate(model, ids, max_tokens=COUNT).tokens == plain.tokens
    raw = speq.generate(model, "hello", max_tokens=COUNT, raw=True)
    assert raw.prompt == model.tokenizer.encode("hello") != ids


def test_logits_are_kept_on_request(model) -> None:
    encoded = speq.encode(model)
    kept = speq.generate(model, "hello", encoded, max_tokens=5, keep_logits=True)
    logits = torch.cat([step.logits for step in kept.steps])
    assert logits.shape == (5, model.config.vocab_size)
    steps = generate(model, kept.prompt, None, max_tokens=5)
    assert torch.equal(logits, torch.cat([step.logits for step in steps]))
    without = speq.generate(model, "hello", encoded, max_tokens=5)
    assert sum(step.logits.numel() for step in without.steps) == 0


def test_a_stream_is_the_text_piece_by_piece(model) -> None:
    """Also where the last token leaves a character open."""
    encoded = speq.encode(model)
    whole = speq.generate(model, "hello", encoded, max_tokens=COUNT)
    for count in (1, 2, 5, COUNT):
        chunks = [*speq.stream(model, "hello", encoded, max_tokens=count)]
        tokens = [token for chunk in chunks for token in chunk.step.tokens]
        assert tokens == whole.tokens[:count]
        assert "".join(text for text, _ in chunks) == model.tokenizer.decode(tokens)
        assert all(len(step.logits) == len(step.tokens) for _, step in chunks)


def test_a_text_ends_behind_a_stop_token(model) -> None:
    whole = speq.generate(model, "hello", max_tokens=COUNT)
    stop = whole.tokens[3]
    first = whole.tokens.index(stop)
    stopping = replace(model, tokenizer=replace(model.tokenizer, stop_ids=frozenset([stop])))
    ended = speq.generate(stopping, "hello", speq.encode(model), max_tokens=COUNT)
    assert ended.tokens == whole.tokens[: first + 1]
    assert ended.text == model.tokenizer.decode(ended.tokens)


def test_sampling_is_seeded(model) -> None:
    def text(seed: int, encoded: speq.EncodedModel | None) -> list[int]:
        sampling = speq.Sampling(temperature=1.5, top_k=50)
        options = {"sampling": sampling, "seed": seed, "max_tokens": COUNT}
        return speq.generate(model, "hello", encoded, **options).tokens

    encoded = speq.encode(model)
    assert text(1, encoded) == text(1, encoded) != text(2, encoded)
    assert text(1, None) == text(1, None) != text(2, None)


def test_encodings_are_written_and_read(model, tmp_path) -> None:
    """What is read is compared with the model, and nothing is replaced by mistake."""
    encoded = speq.encode(model, speq.FormatConfig(32, split=1))
    assert {t.config for t in encoded.tensors.values()} == {speq.FormatConfig(32, split=1)}
    path = tmp_path / "encoded.safetensors"
    for _ in range(2):
        speq.write_encoded(str(path), encoded)
    found = speq.read_encoded(str(path), model)
    assert found.source == model.name and list(found.tensors) == list(encoded.tensors)
    assert torch.equal(found.tensors["head"].draft(), encoded.tensors["head"].draft())
    other = small_config(tied_head=False, context=64)
    write_gguf(tmp_path / "other.gguf", other, random_weights(other, SEED + 1))
    with pytest.raises(ValueError, match=r"it is not of .*: block\.0\.q_proj differs"):
        speq.read_encoded(path, speq.load(tmp_path / "other.gguf"))
    path.write_text("mine")
    with pytest.raises(OSError, match="did not write"):
        speq.write_encoded(path, encoded)
    assert path.read_text() == "mine"
    speq.write_encoded(path, encoded, force=True)
    assert speq.read_encoded(path, model).digests == encoded.digests


def test_an_optimised_encoding_brings_its_settings(model) -> None:
    best = speq.Settings(rows=5, draft_length=1, threshold=0.5)
    encoded = replace(speq.encode(model), settings={"chain": best, "alternates": best})
    made = speq.generate(model, "hello", encoded, max_tokens=COUNT)
    assert max(step.drafted for step in made.steps) == 1


def test_impossible_requests_are_refused_at_once(model) -> None:
    encoded = speq.encode(model)
    session = speq.Session(model, encoded.tensors)
    for arguments, options, message in (
        ((model, ""), {"raw": True}, "prompt has 0 tokens"),
        ((model, [1] * 70), {}, "prompt has 70 tokens; expected 1 to 63"),
        ((model, "hello"), {"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ((session, "hello", encoded), {}, "leave `encoded` out"),
    ):
        for function in (speq.generate, speq.stream):
            with pytest.raises(ValueError, match=re.escape(message)):
                function(*arguments, **options)


# Hardware.


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 8), (3, 9)), {}, "K is 8 in the activations and 9 in the weights"),
        (((9, 8), (3, 8)), {}, "T is 9; allowed are integers from 1 to 8"),
        (((2, 8), (3, 8)), {"mode": "draft"}, "T is 2; allowed are integers from 1 to 1"),
        (((2, 3000), (3, 3000)), {}, "K is 3000; allowed are integers from 1 to 2048"),
        (((2, 8), (3, 8)), {"mode": "fp16"}, "mode is 'fp16'; expected verify, draft or bypass"),
        (((8,), (3, 8)), {}, "activations are torch.float16 of shape [8]; expected a matrix"),
        (
            ((2, 8), (3, 8)),
            {"config": speq.EngineConfig(draft_rows=0)},
            "the engine has no draft_rows: it cannot verify, only bypass",
        ),
    ],
    ids=str,
)
def test_products_that_do_not_fit_are_refused(shapes, options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        speq.gemm(*(np.zeros(shape, np.float16) for shape in shapes), **options)
    with pytest.raises(ValueError, match=r"are torch\.float32 of shape"):
        speq.gemm(*(np.zeros(shape, np.float32) for shape in shapes), **options)


def test_a_model_that_does_not_fit_is_refused_without_a_simulation(model) -> None:
    small = speq.AcceleratorConfig(speq.EngineConfig(rows=2, cols=4, max_k=64))
    with pytest.raises(ValueError, match="is 96; the accelerator's largest K is 64"):
        speq.simulated_session(model, config=small, context=16)


def test_the_alias_is_the_loader() -> None:
    assert speq.load is load_model
    with pytest.raises(speq.CheckpointError, match="nowhere"):
        speq.load(Path("nowhere"))
