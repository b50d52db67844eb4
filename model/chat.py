# SPDX-License-Identifier: Apache-2.0
"""Chat formats: the prompt for a message, and the tokens that end a reply.

A checkpoint's chat template decides (`speq.model.chat_template`). Without one, or where it cannot
be followed, the format is known by its special tokens.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from speq.model.chat_template import TemplateRefusal, UnsupportedTemplate, names, render

# Tokens that end a turn or a text, as in llama.cpp. Those of the second line end it only if the
# vocabulary marks them as special: Gemma has the HTML tag </s>.
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
END_OF_TEXT = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class ChatFormat:
    """How `turn` writes a role and its text. A format without system turns puts that text before
    the user's. `opening` begins the reply."""

    turn: str
    opening: str
    system_turn: bool = True


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
    "[INST]": ChatFormat("[INST]{text}[/INST]", "", system_turn=False),
}
_MARKERS = {"<|user|>": ("<|user|>", "<|end|>")}  # where one token says too little


def known_format(whole: Mapping[str, int]) -> ChatFormat | None:
    """The format whose special tokens the vocabulary has."""
    known = (m for m in _FORMATS if all(token in whole for token in _MARKERS.get(m, (m,))))
    return next((_FORMATS[marker] for marker in known), None)


def prompt(
    template: str,
    named: Mapping[str, str],
    whole: Mapping[str, int],
    user: str,
    system: str | None = None,
) -> tuple[str, bool]:
    """The prompt for one user message, up to the start of the reply, and whether nothing belongs
    before it, because the template itself writes beginning-of-text tokens or has none.

    Without a known format the prompt is the message itself. `template` reads the variables `named`,
    `whole` are the vocabulary's special tokens. Warns, naming what, if the template cannot be
    followed.
    """
    complete = False
    if template:
        try:
            return _from_template(template, named, user, system), True
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
        return f"{system}\n\n{user}" if system else user, complete
    if not chat_format.system_turn:
        user, system = (f"{system}\n\n{user}" if system else user), None
    first = chat_format.turn.format(role="system", text=system) if system else ""
    return first + chat_format.turn.format(role="user", text=user) + chat_format.opening, complete


def _from_template(template: str, named: Mapping[str, str], user: str, system: str | None) -> str:
    def text(*messages: tuple[str, str]) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        nothing = {"tools": None, "documents": None}
        values = {**named, **nothing, "messages": turns, "add_generation_prompt": True}
        return render(template, values)

    if not system:
        return text(("user", user))
    try:
        return text(("system", system), ("user", user))
    except TemplateRefusal:  # a format without system turns
        return text(("user", f"{system}\n\n{user}"))
