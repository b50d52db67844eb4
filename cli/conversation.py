# SPDX-License-Identifier: Apache-2.0
"""What `speq generate` decodes behind: prompts from options, files and standard input, and turns of
a chat.

Every turn's prompt is that of the whole conversation so far, written and encoded anew, so that a
reply does not depend on how the conversation came about. What the KV cache holds of its beginning
need not be computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from speq.model.chat import Message
    from speq.model.checkpoint import Model

#: Bytes of a prompt, more than any context holds.
MAX_PROMPT = 1 << 24
#: Ends a chat.
EXIT = "/exit"
#: In the place of a prompt or of a file's name.
STANDARD_INPUT = "-"


def given_prompt(prompt: str | None, file: Path | None, chat: bool) -> str | None:
    """The prompt that --prompt or --prompt-file gives; None for a chat that begins without one.

    Raises
    ------
    ValueError, OSError
        If there are two, or the file cannot be read or is no text.
    typer.BadParameter
        If there is none.
    """
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --prompt-file exclude each other")
    source = str(file) if file is not None else prompt if prompt == STANDARD_INPUT else None
    if source == STANDARD_INPUT:
        if chat:
            raise ValueError(
                "--chat reads its turns from standard input, so that no prompt can be there: give "
                "the first turn with --prompt TEXT, or none"
            )
        return _without_line_break(_decoded(_read_standard_input(), "standard input"))
    if file is not None:
        from speq.model.input_file import read_limited

        return _without_line_break(_decoded(read_limited(file, MAX_PROMPT), str(file)))
    if prompt is None and not chat:
        raise typer.BadParameter(
            "give --prompt TEXT or --prompt-file FILE", param_hint="'--prompt'"
        )
    return prompt


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise ValueError("standard input is closed: there is no prompt")
    content = sys.stdin.buffer.read(MAX_PROMPT + 1)
    _check_length(content)
    return content


def _check_length(content: bytes) -> None:
    if len(content) > MAX_PROMPT:
        raise ValueError(f"standard input: more than {MAX_PROMPT} bytes of prompt")


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8: byte {content[error.start]:#04x} at offset {error.start}"
        ) from error


def _without_line_break(text: str) -> str:
    """The text without the line break at its end, which editors and `echo` put there."""
    return text.removesuffix("\n").removesuffix("\r")


def turns(first: str | None) -> Iterator[str]:
    """What the user says in a chat: `first` if there is one, then a line each, from a terminal or
    whatever standard input is, up to its end or `EXIT`. Empty lines are no turns.

    Raises ValueError for a line that is no text or too long.
    """
    if first is not None:
        yield first
    number = 0
    while (line := _read_line(number := number + 1)) is not None:
        if line.strip() == EXIT:
            return
        if line.strip():
            yield line


def _read_line(number: int) -> str | None:
    """The next line, which a terminal is asked for; None at the end."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty():
        if sys.stdout.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 (lets `input` edit lines)
            try:
                return input("> ")
            except EOFError:
                print()
                return None
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline(MAX_PROMPT + 1)
    _check_length(line)
    return _without_line_break(_decoded(line, f"standard input, line {number}")) if line else None


class Conversation:
    """A text that the user and the model write in turns.

    Parameters
    ----------
    model : Model
    system : str, optional
        The system's message, before all others.
    raw : bool
        The turns follow one another as they are, without a chat format.
    chat : bool
        There may be more than one turn.

    Raises
    ------
    ValueError
        If the model has no chat format, or its format no system messages, where it needs them.
    """

    def __init__(self, model: Model, *, system: str | None, raw: bool, chat: bool) -> None:
        from speq.model.chat import Message

        self._model, self._raw = model, raw
        tokenizer = model.tokenizer
        if chat and not raw and not tokenizer.has_chat_format:
            raise ValueError(
                f"{model.name} has no chat format: --chat needs --raw, with which the turns are "
                "appended as they are"
            )
        if system is not None and (reason := tokenizer.system_refusal):
            raise ValueError(f"--system cannot be used with {model.name}: {reason}")
        self._messages: list[Message] = [] if system is None else [Message("system", system)]

    def ask(self, turn: str) -> list[int]:
        """Token ids of the prompt that the conversation makes with a further turn of the user's.

        Raises
        ------
        ValueError
            If the model's context leaves no room for a reply, or a text is none.
        """
        from speq.model.chat import Message

        tokenizer, context = self._model.tokenizer, self._model.config.context
        continued = any(message.role == "assistant" for message in self._messages)
        self._messages.append(Message("user", turn))
        if self._raw:
            ids = tokenizer.encode("".join(message.text for message in self._messages))
        else:
            ids = tokenizer.encode_messages(self._messages)
        if continued and len(ids) >= context:
            raise ValueError(
                f"the context is full: the conversation has {len(ids)} tokens, the model's context "
                f"{context}"
            )
        return ids

    def answer(self, text: str) -> None:
        """What the model has replied."""
        from speq.model.chat import Message

        self._messages.append(Message("assistant", text))
