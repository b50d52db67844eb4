# SPDX-License-Identifier: Apache-2.0
"""What commands write, and what they never touch; what is refused before any work."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from speq.cli import bench, benchmarks, evaluate
from speq.cli.bench import NAMES
from speq.hw import EngineConfig
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.verilog import generate
from speq.model import encoding, loaders
from tests.cli.test_cli import ACCELERATOR_FILES, ENGINE_FILES
from tests.hw.common.test_files import KINDS, SHARED_MEMORY, make
from tests.model.small_models import random_weights, small_config, write_gguf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
SMALL = ("--rows", 1, "--cols", 4, "--max-k", 64)
QUICK = ("--prompts-per-kind", 1, "--max-tokens", 4, "--rows", 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A GGUF file with a random model of 264 tokens."""
    config = small_config(tied_head=False, context=512, blocks=1)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return path


@pytest.fixture(scope="module")
def generated() -> tuple[dict[str, str], tuple[str, dict]]:
    """The files of a small accelerator (by the endings of its names) and engine."""
    engine = EngineConfig(rows=1, cols=4, max_k=64)
    files = generate.accelerator_files(AcceleratorConfig(engine, lanes=0), "")
    return files, generate.generate_verilog(engine)


@pytest.fixture
def made_before(generated, monkeypatch):
    """Verilog is generated once for all tests, as it takes seconds."""
    files, engine = generated
    monkeypatch.setattr(
        generate,
        "accelerator_files",
        lambda _, stem: {f"{stem}{ending}": content for ending, content in files.items()},
    )
    monkeypatch.setattr(generate, "generate_verilog", lambda _: engine)


@pytest.fixture
def no_work(monkeypatch):
    """Whatever takes long fails the test."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("this is work")

    monkeypatch.setattr(loaders, "load_model", work)
    monkeypatch.setattr(generate, "accelerator_files", work)
    monkeypatch.setattr(generate, "generate_verilog", work)
    for name in NAMES:
        monkeypatch.setattr(benchmarks, name, work)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


#: Commands that write, by the file of theirs that is in question.
WRITERS = {
    "x.v": ("verilog", *SMALL, "-o", "x.v"),
    "x.h": ("verilog", *SMALL, "-o", "x.v"),
    "e.v": ("verilog", "--engine", *SMALL, "-o", "e.v"),
    "x.safetensors": ("encode", "tiny", "--fixed", "-o", "x.safetensors"),
    "o.safetensors": ("encode", "tiny", "-o", "o.safetensors"),
    "x.image": ("image", "tiny", "-o", "x.image"),
    "bench.json": ("bench", "--only", "verify", "--json", "bench.json"),
    "report.json": ("eval", "tiny", "-o", "."),
    "speedup.svg": ("eval", "tiny", "-o", "."),
    "ablation.png": ("eval", "tiny", "--ablation", "-o", "."),
    "speq.fst": ("waves", "-o", "."),
    "speq.gtkw": ("waves", "-o", "."),
    "speq-under-way.txt": ("waves", "-o", "."),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_only_regular_files_are_replaced(speq_command, no_work, tmp_path, monkeypatch, name, kind):
    """Not even with --force; and this is found before any work."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    make(kind, path)
    before = (path.lstat().st_mode, path.lstat().st_ino)
    for force in ((), ("--force",)):
        result = speq_command(*WRITERS[name], *force)
        assert result.code == 1 and len(result.err) == 1, result.err
        assert result.err[0].startswith(f"speq: error: {name}: ") and KINDS[kind] in result.err[0]
        assert (path.lstat().st_mode, path.lstat().st_ino) == before
    assert {p.name for p in tmp_path.iterdir()} <= {name, "target"}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_others_are_not_replaced(speq_command, no_work, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("written by hand")
    result = speq_command(*WRITERS[name])
    assert result.code == 1 and len(result.err) == 1, result.err
    assert result.err[0].startswith(f"speq: error: {name}: ") and "--force" in result.err[0]
    assert contents(tmp_path) == {name: b"written by hand"}
    assert "this is work" in speq_command(*WRITERS[name], "--force").err[-1]


@pytest.mark.parametrize("name", WRITERS)
def test_places_that_cannot_be_written_are_refused_before_any_work(
    speq_command, no_work, tmp_path, monkeypatch, name
):
    """Instead of the folder there is a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    *arguments, last = WRITERS[name]
    result = speq_command(*arguments, Path("file", last) if last != "." else "file")
    assert result.code == 1 and len(result.err) == 1, result.err
    assert "file" in result.err[0] and "folder" in result.err[0].replace("directory", "folder")
    assert contents(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verilog", *SMALL, "-o", "absent/x.v"), "absent: no such folder"),
        (("encode", "tiny", "-o", "absent/x"), "absent: no such folder"),
        (("encode", "tiny", "-o", "x", "--prompts", "absent.json"), "absent.json"),
        (("encode", "tiny", "-o", "x", "--choices", 1025), "choices is 1025"),
        (("encode", "tiny", "-o", "x", "--rows", 1), "at least 2 rows"),
        (("encode", "tiny", "-o", "x", "--fixed", "--tensors", "("), "--tensors '('"),
        (("eval", "tiny", "-o", "x", "--choices", 0), "choices is 0"),
        (("eval", "tiny", "-o", "x", "--prompts", "absent.json"), "absent.json"),
        (("eval", "tiny", "-o", "x", "--encoded", "absent"), "absent"),
        (("waves", "-o", "x", "--rows", 0), "rows is 0"),
        (("waves", "-o", "x", "--rows", 65), "rows is 65"),
        (("waves", "-o", "x", "--cols", 6), "cols is 6"),
        (("bench", "--json", "absent/x.json"), "absent: no such folder"),
        (("bench", "--liberty", "absent.lib"), "absent.lib: No such file"),
        (("generate", "tiny", "--prompt", "a", "--backend", "rtl", "--cols", 6), "cols is 6"),
        (("generate", "tiny", "--prompt", "a", "--choices", 0), "choices is 0"),
        (("demo-decode", "--model", "tiny", "--rows", 65), "rows is 65"),
        (("demo-decode", "--model", "tiny", "--draft-length", 8), "draft length is 8"),
        (("demo", "--rows", 65), "rows is 65"),
    ],
)
def test_checks_come_before_work(speq_command, no_work, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = speq_command(*arguments)
    assert result.code == 1 and len(result.err) == 1, result.err
    assert message in result.err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["encode", "eval"])
def test_more_choices_than_tokens_are_refused_before_work(
    speq_command, checkpoint, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(encoding, "encode", lambda *_, **__: pytest.fail("this is work"))
    monkeypatch.setattr("speq.model.encoder.optimise", lambda *_, **__: pytest.fail("work"))
    result = speq_command(command, checkpoint, "-o", tmp_path / "x", "--choices", 265)
    assert result.code == 1
    assert "choices is 265; the model has 264 tokens" in result.err[-1]
    assert list(tmp_path.iterdir()) == []


def test_verilog_goes_to_another_file_system(speq_command):
    """And into a mount point, whose parent is another one."""
    if not os.path.ismount(SHARED_MEMORY) or not os.access(SHARED_MEMORY, os.W_OK):
        pytest.skip(f"{SHARED_MEMORY} is no file system of its own, or cannot be written to")
    stem = f"speq_test_{os.getpid()}"
    try:
        result = speq_command("verilog", *SMALL, "--lanes", 0, "-o", SHARED_MEMORY / f"{stem}.v")
        assert result.code == 0, result.err
        written = sorted(path.name for path in SHARED_MEMORY.glob(f"{stem}*"))
        assert written == [f"{stem}{ending}" for ending in ACCELERATOR_FILES]
    finally:
        for path in SHARED_MEMORY.glob(f"{stem}*"):
            path.unlink()


@pytest.mark.parametrize("ending", ACCELERATOR_FILES)
def test_hand_written_files_beside_the_verilog(speq_command, made_before, tmp_path, ending):
    """They stay, unless --force is given or an engine has no file of that name; files that were
    generated need no --force."""
    verilog = ("verilog", *SMALL, "-o", tmp_path / "foo.v")
    hand = tmp_path / f"foo{ending}"
    hand.write_text("// mine\n")
    result = speq_command(*verilog)
    assert result.code == 1 and str(hand) in result.err[0] and "--force" in result.err[0]
    assert contents(tmp_path) == {hand.name: b"// mine\n"}

    engine = speq_command(*verilog, "--engine")
    assert engine.code == (1 if ending in ENGINE_FILES else 0), engine.err
    assert hand.read_text() == "// mine\n"

    result = speq_command(*verilog, "--force")
    assert result.code == 0, result.err
    assert sorted(contents(tmp_path)) == [f"foo{ending}" for ending in ACCELERATOR_FILES]
    assert hand.read_text() != "// mine\n"
    assert speq_command(*verilog).code == 0


def test_files_of_an_accelerator_do_not_stay_beside_an_engine(speq_command, made_before, tmp_path):
    verilog = ("verilog", *SMALL, "-o", tmp_path / "foo.v")
    assert speq_command(*verilog).code == 0
    (tmp_path / "foo.h").write_text("// mine\n")
    (tmp_path / "foo.txt").write_text("mine")
    (tmp_path / "bar.md").write_bytes((tmp_path / "foo.md").read_bytes())
    result = speq_command(*verilog, "--engine")
    assert result.code == 0, result.err
    engine = [f"foo{ending}" for ending in ENGINE_FILES]
    assert sorted(contents(tmp_path)) == sorted(["bar.md", "foo.h", "foo.txt", *engine])
    assert (tmp_path / "foo.h").read_text() == "// mine\n"
    (tmp_path / "foo.h").unlink()
    assert speq_command(*verilog).code == 0  # and back


def test_a_core_with_the_earlier_name_is_replaced(speq_command, made_before, tmp_path):
    (tmp_path / "foo.core").write_text('CAPI=2:\nname: "::speq:0.1.0"\n')
    result = speq_command("verilog", *SMALL, "-o", tmp_path / "foo.v")
    assert result.code == 0, result.err
    assert "speq:ip:" in (tmp_path / "foo.core").read_text()


def test_encode_does_not_replace_a_checkpoint(speq_command, tmp_path):
    """But what it has written itself."""
    name = "model.safetensors"
    tiny = loaders.tiny_path()
    for file in tiny.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    before = contents(tmp_path)
    result = speq_command("encode", tmp_path, "--fixed", "-o", tmp_path / name)
    assert result.code == 1 and "--force" in result.err[0]
    assert contents(tmp_path) == before
    for _ in range(2):
        result = speq_command("encode", "tiny", "--fixed", "-o", tmp_path / "own")
        assert result.code == 0, result.err


def test_eval_shows_its_tables_before_it_stores(speq_command, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")

    def fill_the_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluate, "draw", fill_the_disk)
    result = speq_command("eval", checkpoint, *QUICK, "-o", tmp_path)
    assert result.code == 1 and "No space left" in result.err[-1]
    assert "speedup" in result.out and "over FP16" in result.out
    assert contents(tmp_path) == {"kept": b"kept"}


def test_eval_replaces_its_own_files_only(speq_command, checkpoint, tmp_path):
    """Those of an earlier ablation go."""
    assert speq_command("eval", checkpoint, *QUICK, "-o", tmp_path).code == 0
    first = contents(tmp_path)
    for kind in ("png", "svg"):
        (tmp_path / f"ablation.{kind}").write_bytes(first[f"speedup.{kind}"])
    (tmp_path / "notes.txt").write_text("mine")
    result = speq_command("eval", checkpoint, *QUICK, "-o", tmp_path)
    assert result.code == 0, result.err
    assert contents(tmp_path) == first | {"notes.txt": b"mine"}
    (tmp_path / "ablation.svg").write_text("<svg/>")
    assert speq_command("eval", checkpoint, *QUICK, "-o", tmp_path).code == 0
    assert (tmp_path / "ablation.svg").read_text() == "<svg/>"


def test_bench_replaces_its_own_files(speq_command, tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    monkeypatch.setattr(benchmarks, "codec", lambda _: [benchmarks.Figure("size", 1, "MB")])
    for seed in (1, 2):
        result = speq_command("bench", "--only", "codec", "--json", path, "--seed", seed)
        assert result.code == 0, result.err
        assert json.loads(path.read_text())["seed"] == seed
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]


def test_failed_bench_keeps_the_earlier_file(speq_command, tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    path.write_text('{"seed": 1, "machine": {}}')

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "codec", interrupted)
    assert speq_command("bench", "--only", "codec", "--json", path).code != 0
    assert contents(tmp_path) == {"bench.json": b'{"seed": 1, "machine": {}}'}


def test_every_benchmark_exists():
    assert all(callable(getattr(benchmarks, name)) for name in bench.NAMES)


@pytest.mark.parametrize(
    "command", [("-m", "speq.cli"), ("-c", "import speq.cli; speq.cli.main()")]
)
def test_version(command):
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"speq {version('speq')}\n", "")


def test_the_module_runs_as_the_command_does(tmp_path):
    command = [sys.executable, "-m", "speq.cli", "verilog", "-o", "x.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("speq: error: x.txt: name the Verilog file .v")


WRONG = [
    ("verilog", "-o", "x.v", "--rows", "0"),
    ("encode", "m", "-o", "x", "--group", "48"),
    ("encode", "m", "-o", "x", "--rows", "0"),
    ("encode", "m", "-o", "x", "--split", "4"),
    ("encode", "m", "-o", "absent/x"),
    ("encode", "m", "-o", "."),
    ("eval", "m", "-o", "x", "--rows", "1"),
    ("eval", "m", "-o", "x", "--choices", "0"),
    ("eval", "m", "-o", "x", "--split", "7"),
    ("eval", "m", "-o", "x", "--prompts", "absent"),
    ("waves", "-o", "x", "--rows", "0"),
    ("waves", "-o", "x", "--cols", "6"),
    ("waves", "-o", "x", "--at", "draft", "--start", "1"),
    ("waves", "-o", "x", "--draft-length", "4"),
    ("generate", "m", "--prompt", "a", "--temperature", "-1"),
    ("generate", "m", "--prompt", "a", "--top-k", "1"),
    ("generate", "m", "--prompt", "a", "--rows", "0"),
    ("generate", "m", "--prompt", "a", "--split", "7"),
    ("generate", "m", "--prompt", "a", "--cols", "8"),
    ("generate", "m", "--prompt", "a", "--backend", "rtl", "--cols", "6"),
    ("generate", "m"),
    ("generate", "m", "--prompt", "a", "--prompt-file", "b"),
    ("generate", "m", "--prompt-file", "absent"),
    ("generate", "m", "--chat", "--prompt", "-"),
    ("generate", "m", "--prompt", "a", "--raw", "--system", "b"),
    ("generate", "absent.gguf", "--prompt", "a"),
    ("encode", "absent.gguf", "-o", "x"),
    ("eval", "absent.gguf", "-o", "x"),
    ("waves", "absent.gguf", "-o", "x"),
    ("verilog", "-o", "x.v", "--preset", "huge"),
    ("verilog", "-o", "x.v", "--preset", "wide", "--config", "y"),
    ("verilog", "-o", "x.v", "--config", "absent"),
    ("cycles", "absent.gguf"),
    ("cycles", "tiny", "--context", "-1"),
    ("--verbose", "--quiet", "cycles"),
    ("demo", "--rows", "0"),
    ("demo-decode", "--cols", "6"),
    ("demo-decode", "--threshold", "-1"),
    ("cycles", "--clock", "0"),
    ("cycles", "--latency", "49"),
    ("cycles", "--acceptance", "2"),
    ("cycles", "--rows", "0"),
    ("bench", "--only", "nothing"),
    ("bench", "--json", "absent/x"),
    ("nonsense",),
]


def test_wrong_options_do_not_wait_for_torch(tmp_path):
    code = """if True:
        import json, sys
        import speq.cli
        for arguments in json.loads(sys.argv[1]):
            sys.argv = ["speq", *arguments]
            try:
                speq.cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code
            print(code, "torch" in sys.modules, *arguments)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(WRONG)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    answers = done.stdout.splitlines()
    assert len(answers) == len(WRONG), done.stderr
    for answer, arguments in zip(answers, WRONG, strict=True):
        expected = 2 if arguments in (("nonsense",), ("generate", "m")) else 1
        assert answer == f"{expected} False {' '.join(arguments)}"
    assert list(tmp_path.iterdir()) == []
