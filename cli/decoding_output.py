# SPDX-License-Identifier: Apache-2.0
"""What `speq generate` prints: text as it is committed, figures, and all of it as JSON.

With `--json` standard output gets an object for each prompt, in one line each, of

    version       of speq
    model         as given
    backend       "golden" or "rtl"
    mode          "speq" or "fp16"
    settings      of speculation (rows, draft_length, threshold, choices, reranked, policy,
                  history), max_tokens, sampling (temperature, top_k, top_p, min_p and sampler; null
                  if greedy), array (rows, cols and lanes of the RTL; null in the golden model),
                  encoded and image (the files, or null), raw, chat, system
    seed          of everything random
    prompt_ids    the prompt's tokens
    known         how many of them the KV cache still held, from the turns before
    token_ids     the tokens that were decoded
    text          what they mean
    stop          why decoding ended: "stop token", "max tokens", "context", "error", "interrupted"
    error         what went wrong, or null
    steps         for each step the tokens and their texts (a character of several tokens comes with
                  the last), how many were drafted, accepted and committed, how many alternates were
                  verified, and whether one of them was accepted; how many tokens guessed from
                  earlier text were verified and accepted
    totals        their sums, the rates that follow from them, costs of passes and modelled speedup
                  (null after plain decoding), seconds and tokens per second
    counters      of the accelerator, those of the prompt included (null in the golden model), and
                  the cycles that were simulated

What could not be measured (a ratio whose denominator is 0) is null.
"""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from speq.cli.notes import figures, is_quiet
from speq.cli.simulation import rtl_figures

if TYPE_CHECKING:
    from speq.model.speculation import Statistics, Step

STYLES = {"draft": "green", "alternate": "cyan", "guess": "magenta", "target": "bold yellow"}


@dataclass
class Reply:
    """What was decoded behind a prompt.

    Attributes
    ----------
    prompt : list of int
    known : int
        Tokens of the prompt that were in the KV cache.
    statistics : Statistics
    costs : (float, float), optional
        Of a draft and a verify pass in plain ones; None after plain decoding.
    steps : list of dict
        Figures of each step, as this module describes them.
    text : str
    stop : str
        Why it ended.
    error : ValueError, optional
        Which has ended it.
    seconds : float
    counters : dict, optional
        Of the accelerator, if it has committed anything.
    cycles : int
        That were simulated for it.
    """

    prompt: list[int]
    known: int
    statistics: Statistics
    costs: tuple[float, float] | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    stop: str = "interrupted"
    error: ValueError | None = None
    seconds: float = 0.0
    counters: dict[str, int] | None = None
    cycles: int = 0

    @property
    def tokens(self) -> list[int]:
        """All that were committed."""
        return [token for step in self.steps for token in step["tokens"]]

    def add(self, step: Step, texts: list[str]) -> None:
        """Count a step, whose tokens have these texts."""
        self.statistics.add(step)
        self.steps.append(
            {
                "tokens": step.tokens,
                "texts": texts,
                "drafted": step.drafted,
                "accepted": step.accepted,
                "committed": len(step.tokens),
                "alternates": step.alternates,
                "alternate_hit": step.alternate_hit,
                "guesses": step.guesses,
                "guess_hits": step.guess_hits,
            }
        )


class TextOutput:
    """Prints the text as it comes and the figures behind it.

    Parameters
    ----------
    backend : str
        What decodes, for people.
    seed : int or None
        Of sampling.
    """

    def __init__(self, backend: str, seed: int | None) -> None:
        self._backend, self._seed = backend, seed
        self._console = Console(soft_wrap=True, highlight=False)

    def show(self, text: str, origin: str | None) -> None:
        """A piece of text and where it is from, if that is to be seen."""
        show(self._console, text, origin)

    def finish(self, reply: Reply) -> None:
        """The end of a reply."""
        if reply.error is not None and not reply.steps:
            return  # the error says it all
        print(flush=True)
        lines = summary(reply.statistics, reply.seconds, reply.costs, self._backend)
        if reply.counters is not None:
            lines += rtl_figures(reply.counters, reply.cycles, reply.seconds)
        if self._seed is not None:
            lines.append(f"sampled with seed {self._seed}")
        if reply.stop == "interrupted":
            lines.append("interrupted: the text is not complete")
        figures(lines)
        if reply.costs and reply.error is None and self._console.is_terminal and not is_quiet():
            legend = Console(stderr=True, highlight=False)
            legend.print(*(f"[{style}]{origin}[/]" for origin, style in STYLES.items()), sep=", ")


class JsonOutput:
    """Prints an object in one line for every reply, as this module describes it.

    Parameters
    ----------
    conditions : dict
        What is the same for all: model, backend, mode, settings and seed.
    """

    def __init__(self, conditions: dict[str, Any]) -> None:
        self._conditions = conditions

    def show(self, text: str, origin: str | None) -> None:
        """Nothing, before all is known."""

    def finish(self, reply: Reply) -> None:
        """The object of a reply."""
        record = {"version": version("speq"), **self._conditions, **_record(reply)}
        print(json.dumps(record, allow_nan=False), flush=True)


def _record(reply: Reply) -> dict[str, Any]:
    statistics, seconds = reply.statistics, reply.seconds
    totals: dict[str, Any] = {
        **asdict(statistics),
        "match_rate": statistics.match_rate,
        "tokens_per_pass": statistics.tokens_per_pass,
        "draft_cost": reply.costs and reply.costs[0],
        "verify_cost": reply.costs and reply.costs[1],
        "speedup": reply.costs and statistics.speedup(*reply.costs),
        "seconds": seconds,
        "tokens_per_second": statistics.committed / seconds if seconds else None,
    }
    unknown = {name for name, n in totals.items() if isinstance(n, float) and math.isnan(n)}
    counters = reply.counters and {
        **{name.lower(): n for name, n in reply.counters.items()},
        "simulated_cycles": reply.cycles,
    }
    return {
        "prompt_ids": reply.prompt,
        "known": reply.known,
        "token_ids": reply.tokens,
        "text": reply.text,
        "stop": reply.stop,
        "error": None if reply.error is None else str(reply.error),
        "steps": reply.steps,
        "totals": {name: None if name in unknown else n for name, n in totals.items()},
        "counters": counters,
    }


def summary(
    statistics: Statistics,
    seconds: float,
    costs: tuple[float, float] | None,
    backend: str = "golden model",
) -> list[str]:
    """Lines with the figures of a run; `costs` as `Costs.relative`, None after plain decoding."""
    s = statistics
    speed = f"{s.committed} tokens in {seconds:.1f} s, {s.committed / seconds:.2f} tokens/s"
    if costs is None:
        return [f"{speed} ({backend}, FP16 token by token)"]
    lines = [f"{speed} ({backend})"]
    if not s.committed:
        return lines
    if s.compared:
        lines.append(
            f"acceptance: {s.match_rate:.1%} of {s.compared} compared draft tokens; "
            f"{s.alternate_hits} alternates; {s.tokens_per_pass:.2f} tokens per verify pass"
        )
    if s.guesses:
        lines.append(
            f"{s.guess_hits} of {s.guesses} tokens guessed from earlier text were right; "
            f"{s.free_steps} steps without a draft pass"
        )
    lines.append(
        f"modelled speedup over FP16: {s.speedup(*costs):.2f} ({s.draft_passes} draft passes at "
        f"{costs[0]:.4f}, {s.verify_passes} verify passes at {costs[1]:.4f} of a plain pass)"
    )
    if s.repeated:
        lines.append(f"{s.repeated} verify passes were not finite and were repeated plainly")
    return lines


def show(output: Console, text: str, origin: str | None) -> None:
    """Print a piece of text at once: as it is when piped, on a terminal in its origin's style and
    with control characters made visible, because a model may write anything."""
    if output.is_terminal:
        safe = "".join(map(visible, text))
        output.print(Text(safe, style=STYLES[origin] if origin else ""), end="")
    else:
        print(text, end="", flush=True)


def visible(character: str) -> str:
    """The character, or what stands for one that would control a terminal."""
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    return chr(0x2400 + ord(character)) if character < " " else "\N{REPLACEMENT CHARACTER}"
