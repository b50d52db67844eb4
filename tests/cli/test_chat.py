# SPDX-License-Identifier: Apache-2.0
"""`speq generate --chat`: every reply is that of a run of its own, token for token; where prompts
come from; and what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from speq.cli import conversation
from speq.host.accelerator_model import AcceleratorModel
from speq.host.session import memory_size
from speq.model.aliases import tiny_path
from speq.model.chat import Message
from speq.model.loaders import load_model
from speq.model.speculation import generate
from speq.model.tokenizer import TextStream
from tests.model.small_models import random_weights, small_config, write_gguf, write_hf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
CONTEXT = 160
COUNT = 9
TURNS = ["hello th", "12 and", "hello hello"]

Speq = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A GGUF file with a random model whose chat format is known by its special tokens."""
    config = small_config(tied_head=False, context=CONTEXT, blocks=1)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    return str(path)


@pytest.fixture(scope="module")
def short_tiny(tmp_path_factory) -> str:
    """The shipped model with a context of 64."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    shutil.copytree(tiny_path(), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def say(speq_command: Speq, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Call `speq generate` with standard input."""

    def call(content: str | bytes, *arguments: object) -> SimpleNamespace:
        data = content.encode() if isinstance(content, str) else content
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        return speq_command("generate", *arguments)

    return call


@pytest.fixture
def functional(monkeypatch) -> None:
    """The functional model in place of the simulation."""

    class Simulated(AcceleratorModel):
        before_wait = None

        def cycles(self) -> int:
            return 0

    def board(model: object, encoded: object, config: object, capacity: int) -> Simulated:
        return Simulated(config, memory_size(config, model, encoded, capacity))

    monkeypatch.setattr("speq.cli.decoding.simulated_board", board)


def plain_reply(model: str, prompt: list[int], count: int = COUNT) -> list[int]:
    """What a run of its own decodes, plainly and without a cache of another."""
    loaded = load_model(model)
    stop = loaded.tokenizer.stop_ids
    steps = generate(loaded, prompt, None, max_tokens=count, stop_ids=stop)
    return [token for step in steps for token in step.tokens]


def check_turns(model: str, said: list[str], out: str, system: str | None = None) -> list[dict]:
    """The replies of a chat, each of which must be that of a run behind the whole conversation; all
    of the text before that is still the same is found in the cache."""
    tokenizer = load_model(model).tokenizer
    replies = [json.loads(line) for line in out.splitlines()]
    assert len(replies) == len(said)
    messages = [] if system is None else [Message("system", system)]
    cached: list[int] = []
    for turn, reply in zip(said, replies, strict=True):
        messages.append(Message("user", turn))
        prompt = tokenizer.encode_messages(messages)
        assert reply["prompt_ids"] == prompt
        assert reply["token_ids"] == plain_reply(model, prompt)
        same = [a == b for a, b in zip(cached, prompt[:-1], strict=False)]
        assert reply["known"] == (same.index(False) if False in same else len(same))
        cached = [*prompt, *reply["token_ids"]][:-1]
        messages.append(Message("assistant", reply["text"]))
    return replies


@pytest.mark.parametrize("options", [("--mode", "fp16"), (), ("--backend", "rtl", "--rows", 4)])
def test_replies_are_those_of_runs_of_their_own(say, checkpoint, functional, options):
    chat = (checkpoint, "--chat", "--json", "--max-tokens", COUNT, *options)
    made = say("\n".join(TURNS), *chat)
    assert made.code == 0, made.err
    replies = check_turns(checkpoint, TURNS, made.out)
    # Prompt and reply are still there, but where a reply is cut into other tokens now.
    assert all(reply["known"] > len(replies[0]["prompt_ids"]) - 1 for reply in replies[1:])
    assert [reply["settings"]["chat"] for reply in replies] == [True] * len(TURNS)


def test_a_system_message_is_the_first(say, checkpoint):
    chat = (checkpoint, "--chat", "--json", "--max-tokens", COUNT, "--system", "be kind")
    made = say("hello\n\n \nhello\n/exit\nno more\n", *chat)
    assert made.code == 0, made.err
    check_turns(checkpoint, ["hello", "hello"], made.out, system="be kind")


def test_a_first_turn_may_be_given(say, checkpoint):
    chat = (checkpoint, "--chat", "--json", "--max-tokens", COUNT, "--prompt", "hello")
    made = say("th", *chat)
    assert made.code == 0, made.err
    check_turns(checkpoint, ["hello", "th"], made.out)


#: Leaves out what earlier replies say up to their second character, as templates do with thoughts.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[2:] }}{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>{% endfor %}<|im_start|>assistant "
)


def test_a_template_that_rewrites_the_history(say, tmp_path):
    """The cache goes back to where the text is still the same."""
    config = small_config(tied_head=False, context=CONTEXT, blocks=1)
    write_hf(tmp_path, config, random_weights(config, SEED))
    (tmp_path / "chat_template.jinja").write_text(FORGETFUL)
    made = say("\n".join(TURNS), tmp_path, "--chat", "--json", "--max-tokens", COUNT)
    assert made.code == 0, made.err
    first, second, third = check_turns(str(tmp_path), TURNS, made.out)
    for before, after in ((first, second), (second, third)):
        # The start of the reply is in the same place and no longer the same.
        assert 0 < after["known"] <= len(before["prompt_ids"])


def test_turns_without_a_chat_format_are_appended(say):
    """The whole text is encoded anew for every turn."""
    said = ["Once upon a time", " The dog"]
    chat = ("tiny", "--chat", "--raw", "--json", "--max-tokens", COUNT)
    made = say("\n".join(said), *chat)
    assert made.code == 0, made.err
    first, second = (json.loads(line) for line in made.out.splitlines())
    tokenizer = load_model("tiny").tokenizer
    for reply, text in ((first, said[0]), (second, said[0] + first["text"] + said[1])):
        assert reply["prompt_ids"] == tokenizer.encode(text)
        assert reply["token_ids"] == plain_reply("tiny", reply["prompt_ids"])
    assert second["known"] > len(first["prompt_ids"])


def test_a_conversation_on_the_rtl(say):
    """In the simulator, with the counters of each turn."""
    said = ["One day", " Then"]
    array = ("--backend", "rtl", "--rows", 4, "--cols", 8)
    made = say("\n".join(said), "tiny", "--chat", "--raw", "--json", "--max-tokens", 4, *array)
    assert made.code == 0, made.err
    first, second = (json.loads(line) for line in made.out.splitlines())
    for reply in (first, second):
        assert reply["token_ids"] == plain_reply("tiny", reply["prompt_ids"], 4)
        assert reply["counters"]["committed"] == 4
        assert reply["counters"]["simulated_cycles"] > reply["counters"]["cycles"] > 0
        assert reply["settings"]["array"] == {"rows": 4, "cols": 8, "lanes": 8}
    assert second["known"] >= len(first["prompt_ids"])


def test_a_full_context_ends_the_conversation(say, checkpoint):
    made = say("hello hello\n" * 20, checkpoint, "--chat", "--json", "--max-tokens", 40)
    assert made.code == 1
    replies = [json.loads(line) for line in made.out.splitlines()]
    assert len(replies) >= 2
    assert made.err[-1].startswith("speq: error: the context is full: the conversation has ")
    assert made.err[-1].endswith(f"tokens, the model's context {CONTEXT}")


def test_a_reply_may_end_with_the_context(say, short_tiny):
    chat = (short_tiny, "--chat", "--raw", "--json", "--prompt", "Once upon a time")
    made = say("", *chat)
    assert made.code == 0, made.err
    reply = json.loads(made.out)
    assert reply["stop"] == "context"
    assert len(reply["prompt_ids"]) + len(reply["token_ids"]) == 64
    made = say("more", *chat)
    assert made.code == 1 and "the context is full" in made.err[-1]
    assert len(made.out.splitlines()) == 1


def test_without_turns_there_is_nothing_to_do(say, checkpoint):
    for content in ("", "\n\n", "/exit\nhello\n"):
        made = say(content, checkpoint, "--chat")
        assert (made.code, made.out, made.err) == (0, "", [])


def test_prompts_from_standard_input_and_files(say, checkpoint, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("hello th\n")
    expected = say("", checkpoint, "--max-tokens", COUNT, "--prompt", "hello th").out
    for content, options in (
        ("hello th\r\n", ("--prompt", "-")),
        ("hello th", ("--prompt-file", "-")),
        ("ignored", ("--prompt-file", file)),
    ):
        made = say(content, checkpoint, "--max-tokens", COUNT, *options)
        assert made.code == 0 and made.out == expected
    # Only the last line break is not the prompt's.
    file.write_text("a\n\nb\n\n")
    made = say("", checkpoint, "--max-tokens", 1, "--raw", "--json", "--prompt-file", file)
    tokenizer = load_model(checkpoint).tokenizer
    assert json.loads(made.out)["prompt_ids"] == tokenizer.encode("a\n\nb\n")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"ab\xffc", ("--prompt", "-"), "standard input: not UTF-8: byte 0xff at offset 2"),
        (b"a\n\xc3\n", ("--chat",), "standard input, line 2: not UTF-8: byte 0xc3 at offset 0"),
        (b"", ("--prompt-file", "absent"), "absent: No such file"),
        (b"", ("--prompt-file", "."), ".: Is a directory"),
        (b"", ("--prompt-file", "/dev/zero"), "/dev/zero: not a regular file"),
        (b"", ("--prompt-file", "latin1"), "latin1: not UTF-8: byte 0xe4 at offset 1"),
        (b"", ("--prompt-file", "large"), "large: larger than 1000 bytes"),
        (b"x" * 1001, ("--prompt", "-"), "standard input: more than 1000 bytes"),
        (b"", ("--prompt-file", "x", "--prompt", "y"), "--prompt and --prompt-file exclude each"),
        (b"", ("--chat", "--prompt", "-"), "--chat reads its turns from standard input"),
        (b"", ("--prompt", "a", "--raw", "--system", "b"), "--system is not used with --raw"),
    ],
)
def test_prompts_that_cannot_be_had(
    say, checkpoint, tmp_path, monkeypatch, content, options, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversation, "MAX_PROMPT", 1000)
    Path("latin1").write_bytes("Bär".encode("latin-1"))
    Path("large").write_bytes(b"x" * 1001)
    made = say(content, checkpoint, "--max-tokens", 1, *options)
    assert made.code == 1 and made.err[-1].startswith("speq: error: ")
    assert message in made.err[-1]


def test_a_prompt_is_needed(say, checkpoint):
    made = say("", checkpoint)
    assert made.code == 2 and not made.out
    assert any("--prompt TEXT or --prompt-file FILE" in line for line in made.err)


def test_models_that_cannot_chat_or_have_no_system(say, tmp_path):
    for options, message in (
        (("--chat",), "tiny has no chat format: --chat needs --raw"),
        (
            ("--prompt", "a", "--system", "b"),
            "--system cannot be used with tiny: the model has no chat format",
        ),
    ):
        made = say("hello", "tiny", *options)
        assert made.code == 1 and len(made.err) == 1 and message in made.err[0]
    config = small_config(tied_head=False, context=CONTEXT, blocks=1)
    write_hf(tmp_path, config, random_weights(config, SEED))
    template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}hello"
    (tmp_path / "chat_template.jinja").write_text(template)
    made = say("", tmp_path, "--prompt", "a", "--system", "b")
    assert made.code == 1 and "the chat template refuses it: no system role" in made.err[-1]
    assert say("", tmp_path, "--prompt", "a", "--max-tokens", 1).code == 0


def interrupted(*arguments: object) -> SimpleNamespace:
    """Run `speq generate` and press Ctrl-C when there is some text: all processes of the terminal's
    foreground get the signal."""
    command = [sys.executable, "-m", "speq.cli", "generate", *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        *(command, 0),
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        # Tests that run in the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    first = b""
    while len(first) < 12 and (piece := process.stdout.read(12)):
        first += piece
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    return SimpleNamespace(
        code=process.returncode, out=(first + out).decode(), err=err.decode().splitlines()
    )


@pytest.mark.parametrize("backend", ["golden", "rtl"])
def test_what_an_interruption_leaves(backend):
    """The text and the figures so far."""
    rtl = backend == "rtl"
    array = ("--backend", "rtl", "--cols", 8) if rtl else ()
    made = interrupted(
        "tiny", "--max-tokens", 400, "--prompt", "Once upon a time", "--rows", 4, *array
    )
    assert made.code == 130, made.err
    assert not any("error" in line for line in made.err)
    figures = [line for line in made.err if not line.startswith("speq: ")]
    assert re.match(r"\d+ tokens in \d+\.\d s, ", figures[0])
    assert figures[-1] == "interrupted: the text is not complete"
    assert any(line.startswith("cycles per token, with ") for line in figures) == rtl
    tokenizer = load_model("tiny").tokenizer
    prompt = tokenizer.encode("Once upon a time")
    stream = TextStream(tokenizer, prompt)
    beginning = "".join(map(stream.push, plain_reply("tiny", prompt, 50)))
    shown = made.out.removesuffix("\n")
    assert len(shown) >= 12
    assert beginning.startswith(shown) or shown.startswith(beginning)
