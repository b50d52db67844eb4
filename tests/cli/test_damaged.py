# SPDX-License-Identifier: Apache-2.0
"""The command line with damaged and hostile input: one line that names it, and no harm done."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import speq.cli
import speq.hw.verilog
from speq.cli.decoding_output import visible
from speq.model.encoded_file import EncodedModel, sha256, write_encoded
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings
from tests.model.drafted import randomly_scaled
from tests.model.small_models import (
    VOCABULARY,
    random_weights,
    small_config,
    write_gguf,
    write_hf,
    write_llama2c,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
SETTINGS = {"chain": Settings(6, 3, 0.5, 1), "alternates": Settings(6, 4, 0.25, 3)}

Speq = Callable[..., SimpleNamespace]


@pytest.fixture
def time_limit() -> Iterator[None]:
    """What waits for a pipe fails after a minute."""

    def fail(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a random model of one block and 264 tokens."""
    config = small_config(tied_head=False, blocks=1, context=64)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return path


@pytest.fixture
def encoded(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, encoded, and settings."""
    model = load_model(checkpoint)
    tensors = randomly_scaled(model, np.random.default_rng(SEED), FormatConfig(32))
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    path = tmp_path / "model.safetensors"
    write_encoded(path, EncodedModel(str(checkpoint), tensors, digests, SETTINGS))
    return path


def flip(path: Path, tensor: str, bit: int) -> None:
    """Flip a bit of the first byte of a tensor in a safetensors file."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    offset = json.loads(content[8 : 8 + size])[tensor]["data_offsets"][0]
    content[8 + size + offset] ^= 1 << bit
    path.write_bytes(content)


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Change the header of a safetensors file, which keeps its length."""
    content = path.read_bytes()
    assert len(old) == len(new) and content.count(old) == 1
    path.write_bytes(content.replace(old, new))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "draft": lambda path: flip(path, "head.draft", 0),
    "residual": lambda path: flip(path, "head.residual", 7),
    "base": lambda path: flip(path, "head.groups", 1),
    "scale": lambda path: flip(path, "head.groups", 6),  # which decodes to the same weights
    "settings": lambda path: edit(path, rb"\"threshold\": 0.25", rb"\"threshold\": 0.75"),
    "formats": lambda path: edit(
        path,
        rb'"block.0.q_proj\": {\"shape\": [64, 64], \"format\": {\"group\": 32, \"split\": 2',
        rb'"block.0.q_proj\": {\"shape\": [64, 64], \"format\": {\"group\": 32, \"split\": 3',
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["golden", "rtl", "eval", "image", "verify-file"])
def test_damaged_encoded_files_say_nothing(
    speq_command: Speq,
    checkpoint: Path,
    encoded: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    damage: str,
) -> None:
    """Whatever takes an encoded file compares it with its digests first."""

    def simulate(*_: object) -> None:
        raise AssertionError("simulated")

    monkeypatch.setattr("speq.cli.decoding.simulated_board", simulate)
    DAMAGE[damage](encoded)
    generate = ("generate", checkpoint, "--prompt=a", "--encoded", encoded)
    arguments = {
        "golden": generate,
        "rtl": (*generate, "--backend", "rtl"),
        "eval": ("eval", checkpoint, "--encoded", encoded, "-o", encoded.parent / "eval"),
        "image": ("image", checkpoint, "--encoded", encoded, "-o", encoded.parent / "x.image"),
        "verify-file": ("verify-file", encoded),
    }[command]
    result = speq_command(*arguments)
    assert (result.code, result.out) == (1, "")
    (line,) = result.err
    assert line.startswith(f"speq: error: {encoded} is no intact encoded model: "), line
    assert "digest" in line
    assert [path.name for path in encoded.parent.iterdir()] == [encoded.name]


def test_planes_that_decode_to_other_weights_are_refused(
    speq_command: Speq, checkpoint: Path, encoded: Path
) -> None:
    """With digests of their own, so that nothing is damaged."""
    model = load_model(checkpoint)
    tensors = randomly_scaled(model, np.random.default_rng(SEED), FormatConfig(32))
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    tensors["head"].draft_plane[0, 0, 0] ^= 1
    write_encoded(encoded, EncodedModel(str(checkpoint), tensors, digests, SETTINGS))
    result = speq_command("generate", checkpoint, "--prompt=a", "--encoded", encoded)
    expected = f"speq: error: {encoded}: head does not decode to its original bits"
    assert (result.code, result.out, result.err) == (1, "", [expected])


class Panic(BaseException):
    """As PyO3's panics, which are no Exceptions."""


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (RuntimeError("broken\n  \x1b[2Jtwice"), r"RuntimeError: broken \x1b[2Jtwice (this should"),
        (KeyError("name"), "KeyError: 'name' (this should"),
        (Panic("index out of range"), "Panic: index out of range (this should"),
        (RecursionError(), "RecursionError: RecursionError (this should"),
        (MemoryError(), "not enough memory: MemoryError"),
        (RuntimeError("can't allocate memory: you tried"), "not enough memory: can't allocate"),
    ],
)
def test_the_last_net(
    speq_command: Speq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    answer: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(speq.hw.verilog, "write_verilog", fail)
    result = speq_command("verilog", "-o", tmp_path / "x.v")
    assert result.code == 1
    (line,) = result.err
    assert line.startswith(f"speq: error: {answer}")
    if "this should" in answer:
        assert "report" in line and "SPEQ_DEBUG=1" in line
    monkeypatch.setenv("SPEQ_DEBUG", "1")
    with pytest.raises(type(error)):
        speq.cli.main()


def test_messages_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\x9b2J\x07\x00\u202eb\ud800\r\nc ä 世"
    shown = r"a\x1b[2J\x9b2J\x07\x00\u202eb\ud800 c ä 世"
    assert speq.cli.describe(ValueError(hostile)) == shown
    assert speq.cli.describe(OSError(2, "No such file", "\x1b]0;x")) == r"\x1b]0;x: No such file"
    speq.cli.show_warning(hostile)
    assert capsys.readouterr().err == f"speq: warning: {shown}\n"


def test_text_cannot_control_a_terminal() -> None:
    assert "".join(map(visible, "a\x1b[2J\x07\r\x7f\x9b\n\tä")) == "a␛[2J␇␍��\n\tä"


OPTIONS = [
    (("generate", "tiny", "--prompt=a", "--backend=rtl", "--cols=0"), "cols is 0"),
    (("generate", "tiny", "--prompt=a", "--temperature=1e-320"), "temperature is 1e-320; expected"),
    (("generate", "tiny", "--prompt=a", "--temperature=1e300"), "temperature is 1e+300; expected"),
    (("generate", "tiny", "--prompt=a", "--temperature=nan"), "'--temperature': nan is no finite"),
    (("generate", "tiny", "--prompt=a", "--temperature=inf"), "'--temperature': inf is no finite"),
    (("generate", "tiny", "--prompt=a", "--threshold=inf"), "'--threshold': inf is no finite"),
    (("generate", "tiny", "--prompt=a", "--threshold=nan"), "'--threshold': nan is no finite"),
    (("generate", "tiny", "--prompt=a", "--temperature=1", "--top-k=" + "9" * 30), "to 16777216"),
    (("generate", "tiny", "--prompt=a", "--temperature=1", "--top-p=nan"), "top-p is nan"),
    (("generate", "tiny", "--prompt=a\udcff"), r"the text is no UTF-8: '\udcff' at position"),
    *(
        (("generate", "tiny", "--prompt=a", "--mode=fp16", f"--{option}=0"), f"--{option} is not")
        for option in (
            *("draft-length", "threshold", "choices", "rows", "group", "split", "encoded"),
        )
    ),
    (("generate", "[/x]", "--prompt=a"), "[/x]: not a model"),
    (("encode", "[/x]", "-o", "x"), "[/x]: not a model"),
    (("eval", "[/x]", "-o", "x"), "[/x]: not a model"),
    (("verilog", "-o", "x.v", "--weights-bits=0"), "the weights port: data_bits is 0; allowed"),
    (("verilog", "-o", "x.v", "--data-bits=0"), "the data port: data_bits is 0; allowed"),
    (("verilog", "-o", "x.v", "--address-bits=0"), "address_bits is 0; allowed"),
    (("verilog", "-o", "x.v", "--engine", "--weights-bits=64"), "--weights-bits is not used with"),
    (("verilog", "-o", "x.v", "--engine", "--data-bits=0"), "--data-bits is not used with"),
    (("verilog", "-o", "x.v", "--engine", "--address-bits=40"), "--address-bits is not used"),
    (("encode", "tiny", "-o", "x", "--fixed", "--rows=8"), "--rows is not used with --fixed"),
    (("encode", "tiny", "-o", "x", "--fixed", "--choices=0"), "--choices is not used with --fixed"),
    (("encode", "tiny", "-o", "x", "--fixed", "--max-tokens=9"), "--max-tokens is not used with"),
    (("encode", "tiny", "-o", "x", "--fixed", "--prompts=x"), "--prompts is not used with --fixed"),
    (("encode", "tiny", "-o", "x", "--rows=0"), "rows is 0; expected 1 to 1024"),
    (("waves", "--start=0", "--nth=1"), "--nth is not used with --start"),
    (("waves", "--rows=0"), "rows is 0; expected 1 to 1024"),
    (("demo-decode", "--model=tiny", "--threshold=inf"), "'--threshold': inf is no finite"),
    (("demo", "--rows=0"), "rows is 0; allowed"),
    (("cycles", "--clock=nan"), "clock is nan; expected"),
    (("cycles", "--clock=inf"), "clock is inf; expected"),
    (("cycles", "--cols=0"), "cols is 0"),
    (("cycles", "--acceptance=nan"), "acceptance is nan; expected"),
    (("cycles", "--acceptance=inf"), "acceptance is inf; expected"),
]


@pytest.mark.parametrize(("arguments", "answer"), OPTIONS, ids=[" ".join(o[0]) for o in OPTIONS])
def test_impossible_options(
    speq_command: Speq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    answer: str,
) -> None:
    """0 is a value, not a number is none, and what has no use is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    result = speq_command(*arguments)
    assert result.code in (1, 2) and not result.out
    assert answer in " ".join(result.err), result.err
    if result.code == 1:
        assert len(result.err) == 1 and result.err[0].startswith("speq: error: ")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def replaced(path: Path, kind: str) -> None:
    """Something that is no regular file at this path."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_read(
    speq_command: Speq, checkpoint: Path, tmp_path: Path, time_limit: None, kind: str
) -> None:
    """Reading a pipe may never begin, and a device may have no end."""
    config = load_model(checkpoint).config
    weights = random_weights(config, SEED)
    files = ["config.json", "tokenizer.json", "model-00001-of-00001.safetensors"]
    files += [
        "chat_template.jinja",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    ]
    cases = []
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        write_hf(folder, config, weights)
        cases.append((folder / name, ("generate", folder, "--prompt=a")))
    story = small_config(vocab_size=VOCABULARY["pieces"])
    for name in ("story.bin", "tokenizer.bin"):
        path = tmp_path / name.removesuffix(".bin") / "story.bin"
        path.parent.mkdir()
        write_llama2c(path, story, random_weights(story, SEED))
        cases.append((path.parent / name, ("generate", path, "--prompt=a")))
    gguf, other = tmp_path / "x.gguf", tmp_path / "x"
    cases += [
        (gguf, ("generate", gguf, "--prompt=a")),
        (other, ("generate", checkpoint, "--prompt=a", "--encoded", other)),
        (other, ("eval", checkpoint, "-o", tmp_path / "out", "--encoded", other)),
        (other, ("eval", checkpoint, "-o", tmp_path / "out", "--prompts", other)),
        (other, ("encode", checkpoint, "-o", tmp_path / "out", "--prompts", other)),
        (other, ("verify-file", other)),
        (other, ("image", "--info", other)),
        (other, ("generate", checkpoint, "--prompt=a", "--backend=rtl", "--image", other)),
    ]
    for path, arguments in cases:
        replaced(path, kind)
        result = speq_command(*arguments)
        assert (result.code, result.out) == (1, ""), (path, result)
        assert len(result.err) == 1 and f"{path}: not a regular file" in result.err[0], result.err


def test_special_files_are_no_cell_libraries(tmp_path: Path, time_limit: None) -> None:
    from speq.cli.area import unit_areas
    from speq.hw import EngineConfig

    replaced(tmp_path / "x.lib", "device")
    with pytest.raises(OSError, match="not a regular file"):
        unit_areas(EngineConfig(), tmp_path / "x.lib")


@pytest.mark.parametrize(
    ("prompts", "answer"),
    [
        ({"kind": ["fine", "half \ud800"]}, "kind 'kind' must be a list"),
        ({"\x1b[2J": ["a"]}, "cannot be the name of a kind"),
        ({"all": ["a"]}, "'all' cannot be the name of a kind"),
    ],
)
def test_prompts_that_are_no_text(
    speq_command: Speq, checkpoint: Path, tmp_path: Path, prompts: dict, answer: str
) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts))
    for command in ("eval", "encode"):
        result = speq_command(command, checkpoint, "-o", tmp_path / "out", "--prompts", path)
        assert result.code == 1 and len(result.err) == 1
        assert str(path) in result.err[0] and answer in result.err[0]
        assert "\x1b" not in result.err[0]


def test_errors_name_the_users_file(
    speq_command: Speq, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the temporary one that was to take its place."""
    path = tmp_path / "out.safetensors"

    def damage(temporary: Path, *_: object) -> None:
        temporary.write_bytes(b"damaged")

    monkeypatch.setattr("speq.model.encoded_file.write_encoded", damage)
    result = speq_command("encode", checkpoint, "-o", path, "--fixed", "--verify")
    assert result.code == 1
    assert result.err[-1].startswith(f"speq: error: {path} is no intact encoded model")
