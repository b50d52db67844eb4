# SPDX-License-Identifier: Apache-2.0
"""`speq inspect`: the report as text and as JSON, and impossible options."""

from __future__ import annotations

import json

import pytest

from speq.host.inspection import report
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig


def test_text_and_json(speq_command) -> None:
    options = ("--rows", 4, "--cols", 8, "--max-k", 128, "--context", 200, "--clock", 100)
    options = (*options, "--acceptance", 0.5, "--latency", 20)
    config = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=128))
    expected = report("tiny", config, context=200, clock=100.0, acceptance=0.5, latency=20)
    made = speq_command("inspect", "tiny", *options)
    assert (made.code, made.out, made.err) == (0, f"{expected}\n", [])
    assert "- FFN size 172, at most 128: --max-k 256" in made.out
    made = speq_command("inspect", "tiny", "--json", *options)
    assert made.code == 0 and json.loads(made.out) == expected.to_dict()


def test_a_model_that_is_not_supported_is_no_error(speq_command, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 5}')
    made = speq_command("inspect", tmp_path)
    assert made.code == 0 and "supported     no" in made.out
    assert "architecture 'gpt2' is not supported" in made.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "--cols", 3), "cols is 3; the accelerator needs a power of two"),
        (("tiny", "--max-k", 0), "max_k is 0"),
        (("tiny", "--clock", -1), "clock is -1.0"),
        (("tiny", "--acceptance", 2), "acceptance is 2.0; expected a probability"),
        (("nowhere",), "nowhere: not a model"),
    ],
)
def test_impossible_requests_are_one_line(speq_command, arguments, message) -> None:
    made = speq_command("inspect", *arguments)
    assert made.code == 1 and made.out == ""
    (line,) = made.err
    assert line.startswith("speq: error: ") and message in line
