# SPDX-License-Identifier: Apache-2.0
"""`speq cycles`: the table, and impossible options."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from speq.cli import app
from speq.model.cycles import Engine
from speq.model.prediction import MODELS, predict

SMOLLM2 = MODELS["SmolLM2-135M"]


def test_table():
    result = CliRunner().invoke(app, ["cycles", "--cols", "16", "--acceptance", "0.8"])
    assert result.exit_code == 0
    p = predict(SMOLLM2, Engine(rows=8, cols=16, latency=48), 0.8, 1024)
    line = next(line for line in result.output.splitlines() if "SmolLM2" in line)
    for value in (f"{p.plain / 1e6:.3f} M", f"{500e6 / p.plain:.4g}", f"{p.speedup:.2f}"):
        assert value in line
    assert "16 GB/s" in result.output  # 16 columns of 2 bytes at 500 MHz
    for name in MODELS:
        assert name in result.output


@pytest.mark.parametrize(
    "options",
    [
        ("--acceptance", "2"),
        ("--clock", "0"),
        ("--context", "-1"),
        ("--rows", "0"),
        ("--cols", "128"),
        ("--cols", "24"),
        ("--latency", "49"),
    ],
)
def test_impossible_values(options):
    result = CliRunner().invoke(app, ["cycles", *options])
    assert isinstance(result.exception, ValueError)
