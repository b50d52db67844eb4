# SPDX-License-Identifier: Apache-2.0
"""The command line, called in this process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import speq.cli


@pytest.fixture
def speq_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Call `speq` with arguments: exit code, standard output, lines of standard error, with what
    libraries print themselves."""
    # main() replaces this; the fixture puts it back.
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delenv("SPEQ_DEBUG", raising=False)

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["speq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            speq.cli.main()
        captured = capfd.readouterr()
        return SimpleNamespace(
            code=stop.value.code or 0, out=captured.out, err=captured.err.splitlines()
        )

    return call
