# SPDX-License-Identifier: Apache-2.0
"""Commands on a terminal: tables and progress fit it, chats are held, and shells complete."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from speq.cli.decoding import Decoding
from speq.cli.notes import set_verbosity
from speq.cli.progress import bar_columns, bars, elapsed, remaining
from speq.model.aliases import ALIASES
from speq.model.prediction import MODELS
from tests.model.small_models import random_weights, small_config, write_gguf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
QUICK = ("--prompts-per-kind", 1, "--max-tokens", 6, "--rows", 4)
#: Commands in one process, as importing torch takes longer than they do.
RUN = """if True:
    import json, sys
    import speq.cli
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["speq", *arguments]
        try:
            speq.cli.main()
        except SystemExit as stop:
            print("exit", stop.code)
"""
_CONTROL = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class Terminal:
    """A process on a terminal of so many columns."""

    def __init__(self, command: list[str], columns: int) -> None:
        self.pid, self._file = pty.fork()
        if not self.pid:  # the child, on the terminal
            environment = {**os.environ, "TERM": "xterm"}
            for name in ("COLUMNS", "LINES"):
                environment.pop(name, None)
            time.sleep(0.2)  # until its size is set
            os.execve(command[0], command, environment)
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.shown = ""
        self._seen = 0

    def wait_for(self, text: str) -> None:
        """Read until this is shown behind what was waited for before."""
        while (place := _CONTROL.sub("", self.shown).find(text, self._seen)) < 0:
            assert self._read(), f"{text!r} is not in {self.shown!r}"
        self._seen = place + len(text)

    def type(self, text: str) -> None:
        """What a user does."""
        os.write(self._file, text.encode())

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def lines(self) -> list[str]:
        """Everything that was shown in a line at some time, without control sequences."""
        text = _CONTROL.sub("", self.shown)
        return [line.rstrip() for line in re.split(r"[\r\n]+", text)]

    def _read(self) -> bool:
        assert select.select([self._file], [], [], 60)[0], f"nothing comes behind {self.shown!r}"
        try:
            piece = os.read(self._file, 1 << 16)
        except OSError as error:  # how Linux says that nobody is at the other end
            if error.errno != errno.EIO:
                raise
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece)


def on_terminal(columns: int, *commands: tuple[object, ...]) -> list[str]:
    """The lines that commands show on a terminal; all must succeed."""
    arguments = json.dumps([[str(a) for a in command] for command in commands])
    terminal = Terminal([sys.executable, "-c", RUN, arguments], columns)
    assert terminal.end() == 0
    lines = terminal.lines()
    assert lines.count("exit 0") == len(commands), terminal.shown
    return lines


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A GGUF file with a random model of 264 tokens and a chat format."""
    config = small_config(tied_head=False, context=512)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return path


#: Progress whose line ends with a count and a time, or with a time alone.
_BAR = re.compile(r"(encoding|drafting|decoding the FP16 texts|loading .*?)\s.*")
_COUNTED = re.compile(r".* \d+/(\d+|\?) +\d+:\d\d:\d\d")


def check_progress(lines: list[str], columns: int) -> None:
    """Counts and times are whole."""
    progress = [line for line in lines if _BAR.fullmatch(line) and not line.startswith("encoding:")]
    assert progress
    for line in progress:
        assert _COUNTED.fullmatch(line), line
        assert len(line) <= columns, line


@pytest.mark.parametrize("columns", [40, 59, 60, 80])
@pytest.mark.parametrize("name", ["encoding", "decoding the FP16 texts", "loading " + "x" * 90])
def test_progress_fits_narrow_lines(monkeypatch, capsys, columns, name):
    """The last state, which stays where there is no terminal, as on one."""
    monkeypatch.setenv("COLUMNS", str(columns))
    set_verbosity(verbose=False, quiet=False)
    with bars() as progress:
        progress.add_task(name, total=123456, completed=123456)
    counted = capsys.readouterr().err.rstrip()
    assert re.fullmatch(r".* 123456/123456 0:00:00", counted)
    console = Console(stderr=True)
    figures = (TextColumn("100%"), elapsed(), TextColumn("left"), remaining())
    with Progress(*bar_columns(console, *figures), console=console) as progress:
        progress.add_task(name, total=10, completed=5)
    timed = capsys.readouterr().err.rstrip()
    assert re.fullmatch(r".* 100% 0:00:\d\d left (-:--:--|0:00:\d\d)", timed)
    assert max(len(counted), len(timed)) <= columns
    assert ("━" in counted) == (columns >= 60)


def test_tables_and_progress_fit_80_columns(checkpoint, tmp_path):
    commands = [
        ("cycles",),
        ("cycles", "tiny"),
        ("bench", "--only", "verify"),
        ("eval", checkpoint, *QUICK, "-o", tmp_path / "out"),
        ("encode", checkpoint, "--fixed", "-o", tmp_path / "x.safetensors"),
    ]
    lines = on_terminal(80, *commands)
    check_progress(lines, 80)
    own = tmp_path.name, checkpoint.name  # paths are as long as they are
    for line in lines:
        assert len(line) <= 80 or any(name in line for name in own), line
        assert "…" not in line or line.startswith("loading ")  # such a long path
    for name in (*MODELS, "verify_gemm, T = 1", "story", "translation"):
        assert any(line.startswith(name) for line in lines), name


def test_a_chat_on_a_terminal(checkpoint):
    """The prompt, the reply in colours, figures, and the end by Ctrl-D."""
    command = [sys.executable, "-m", "speq.cli", "generate", str(checkpoint), "--chat"]
    terminal = Terminal([*command, "--max-tokens", "5"], 80)
    for _ in range(2):
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("5 tokens in ")
        terminal.wait_for("draft, alternate, guess, target")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0, terminal.shown
    assert "\x1b[32m" in terminal.shown  # what was drafted is green


def completions(shell: str, words: str) -> subprocess.CompletedProcess[str]:
    """What a shell is offered behind some words, and that torch is not loaded for it."""
    code = """if True:
        import atexit, sys
        atexit.register(lambda: sys.modules.get("torch") and print("torch is loaded"))
        import speq.cli
        sys.argv = ["speq"]
        speq.cli.main()
    """
    environment = {
        "_SPEQ_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_models_and_choices(shell):
    offers = {
        "speq generate ": ALIASES,
        "speq generate tiny --mode ": Decoding,
    }
    if shell == "bash":  # the others are offered the same
        offers |= {
            "speq ": ("generate", "verilog", "cycles"),
            "speq cycles s": ("smollm2",),
            "speq verilog --preset w": ("wide",),
            "speq bench --only ver": ("verify", "verilog"),
            "speq generate tiny --prompt-f": ("--prompt-file",),
        }
    for words, expected in offers.items():
        made = completions(shell, words)
        assert made.stderr == ""
        assert "torch is loaded" not in made.stdout
        for name in expected:
            assert name in made.stdout, words


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "complete -o default -F _speq_completion speq"),
        ("zsh", "compdef _speq_completion speq"),
        ("fish", "complete --command speq "),
    ],
)
def test_what_completion_installs_can_be_shown(shell, line):
    """The shell is named here; users' is detected."""
    command = [sys.executable, "-m", "speq.cli", "--show-completion", shell]
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    made = subprocess.run(command, env=named, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    assert line in made.stdout and f"_SPEQ_COMPLETE=complete_{shell}" in made.stdout
