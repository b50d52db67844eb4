# SPDX-License-Identifier: Apache-2.0
"""Chat formats: the prompt for a conversation, and the tokens that end a reply.

A checkpoint's chat template decides (`speq.model.chat_template`). Without one, or where it cannot
be followed, the format is known by its special tokens.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from speq.model.chat_template import TemplateRefusal, UnsupportedTemplate, names, render

# Tokens that end a turn or a text, as in llama.cpp. Those of the second line end it only if the
# vocabulary marks them as special: Gemma has the HTML tag </s>.
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
END_OF_TEXT = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")


class Message(NamedTuple):
    """What one of "system", "user" and "assistant" says."""

    role: str
    text: str


@dataclass(frozen=True)
class ChatFormat:
    """How `turn` writes a role and its text. A format without system turns puts that text before
    the first of the user's. `opening` begins a reply and `closing` ends it, by default as `turn`
    ends."""

    turn: str
    opening: str
    system_turn: bool = True
    closing: str | None = None

    def write(self, messages: Sequence[Message]) -> str:
        """The text of a conversation."""
        closing = self.turn.partition("{text}")[2] if self.closing is None else self.closing
        return "".join(
            f"{self.opening}{text}{closing}"
            if role == "assistant"
            else self.turn.format(role=role, text=text)
            for role, text in (messages if self.system_turn else _without_system(messages))
        )


_FORMATS = {
    "<|im_start|>": ChatFormat("<|im_start|>{role}\n{text}<|im_end|>\n", "<|im_start|>assistant\n"),
    "<|start_header_id|>": ChatFormat(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "<start_of_turn>": ChatFormat(
        "<start_of_turn>{role}\n{text}<end_of_turn>\n", "<start_of_turn>model\n", system_turn=False
    ),
    "<|start_of_role|>": ChatFormat(
        "<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "<|user|>": ChatFormat("<|{role}|>\n{text}<|end|>\n", "<|assistant|>\n"),
    "[INST]": ChatFormat("[INST]{text}[/INST]", "", system_turn=False, closing="</s>"),
}
_MARKERS = {"<|user|>": ("<|user|>", "<|end|>")}  # where one token says too little


def known_format(whole: Mapping[str, int]) -> ChatFormat | None:
    """The format whose special tokens the vocabulary has."""
    known = (m for m in _FORMATS if all(token in whole for token in _MARKERS.get(m, (m,))))
    return next((_FORMATS[marker] for marker in known), None)


def messages(user: str, system: str | None = None) -> list[Message]:
    """A conversation that begins: the user's message, behind the system's if there is one."""
    return [*([Message("system", system)] if system else []), Message("user", user)]


def prompt(
    template: str,
    named: Mapping[str, str],
    whole: Mapping[str, int],
    conversation: Sequence[Message],
) -> tuple[str, bool]:
    """The prompt for a reply to a conversation, up to the start of the reply, and whether nothing
    belongs before it, because the template itself writes beginning-of-text tokens or has none.

    Without a known format the prompt is the messages' texts. `template` reads the variables
    `named`, `whole` are the vocabulary's special tokens. A system message that has no turn of its
    own is put before the user's first one. Warns, naming what, if the template cannot be followed.
    """
    complete = False
    if template:
        try:
            return _from_template(template, named, conversation), True
        except (UnsupportedTemplate, TemplateRefusal) as error:
            chosen = "by the special tokens" if known_format(whole) else "without a chat format"
            warnings.warn(
                f"the chat template is not followed ({error}); the prompt is written {chosen}",
                stacklevel=2,
            )
        opening = named.get("bos_token")
        complete = "bos_token" not in names(template) and not (opening and opening in template)
    chat_format = known_format(whole)
    if chat_format is None:
        return "\n\n".join(text for _, text in conversation), complete
    return chat_format.write(conversation) + chat_format.opening, complete


def system_refusal(template: str, named: Mapping[str, str], whole: Mapping[str, int]) -> str | None:
    """Why a system message would not reach the model as one; None if it would."""
    probe = "the-system-message"
    if template:
        try:
            written = _render(template, named, messages("hello", probe))
            return None if probe in written else "the chat template leaves it out"
        except TemplateRefusal as error:
            return f"the chat template refuses it: {error}"
        except UnsupportedTemplate:
            pass  # `prompt` says what is done instead
    chat_format = known_format(whole)
    if chat_format is None:
        return "the model has no chat format"
    return None if chat_format.system_turn else "the model's chat format has no system messages"


def _from_template(template: str, named: Mapping[str, str], conversation: Sequence[Message]) -> str:
    try:
        return _render(template, named, conversation)
    except TemplateRefusal:
        if conversation[0].role != "system":
            raise
        return _render(template, named, _without_system(conversation))


def _render(template: str, named: Mapping[str, str], conversation: Sequence[Message]) -> str:
    turns = [{"role": role, "content": text} for role, text in conversation]
    nothing = {"tools": None, "documents": None}
    return render(template, {**named, **nothing, "messages": turns, "add_generation_prompt": True})


def _without_system(conversation: Sequence[Message]) -> Sequence[Message]:
    """The conversation with the system's message before the user's first one, in one turn."""
    if conversation[0].role != "system":
        return conversation
    system, user, *rest = conversation
    return [Message("user", f"{system.text}\n\n{user.text}" if system.text else user.text), *rest]
