# SPDX-License-Identifier: Apache-2.0
"""What a model would do on an accelerator: whether it runs, where, in how much memory, how fast.

Everything follows from dimensions, so that a checkpoint's headers are enough.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speq.host.checks import check_model, check_vector_unit
from speq.host.cycles import predicted_passes
from speq.host.layout import exceeded_limits
from speq.host.programs import ModelLayout
from speq.hw.accelerator_config import AcceleratorConfig
from speq.model.checkpoint import Model, ModelConfig, linear_names, tensor_shapes
from speq.model.cycles import Engine, draft_pass, kv_bytes, plain_pass, uniform_formats, verify_pass
from speq.model.loaders import read_header
from speq.model.loaders.header import Header, StoredTensor
from speq.model.prediction import predict
from speq.model.schedule import Attention, Linears, Operation, Vector, pass_schedule
from speq.model.tokenizer import Tokenizer

#: Positions of context of a prediction, unless something else is asked for.
DEFAULT_CONTEXT = 1024
#: Largest K of an accelerator.
MAX_K = 1 << 16

#: What `ModelConfig` calls sizes, for people.
_SIZES = {
    "vocab_size": "vocabulary",
    "hidden": "hidden",
    "ffn_hidden": "FFN",
    "blocks": "blocks",
    "heads": "heads",
    "kv_heads": "KV heads",
    "head_dim": "head size",
    "context": "context",
}
_MOST_TOKENS = 1 << 21  # that a tokenizer may have
_WIDTH = 80
_LABEL = 14  # of its columns
#: What the vector unit computes, by operation of the schedule.
_VECTORS = {
    Operation.EMBED: "embedding",
    Operation.NORM: "RMSNorm",
    Operation.ADD_BIAS: "biases",
    Operation.ROTATE: "rotary embedding",
    Operation.GATE: "activation of the gate",
    Operation.ADD: "residual additions",
}


@dataclass(frozen=True)
class Limit:
    """A size of the model that the accelerator's configuration does not allow.

    Attributes
    ----------
    what : str
    size, allowed : int
    remedy : str
        What to change.
    """

    what: str
    size: int
    allowed: int
    remedy: str


@dataclass(frozen=True)
class Bytes:
    """Memory of a model.

    Attributes
    ----------
    fp16 : int
        All weights in FP16.
    linear : int
        Of these the linear layers, which the accelerator reads, with 16 bits for each weight.
    draft : int
        Of these 16 bits, the draft plane.
    overhead : int
        Group bytes, and padding of the planes to the array's columns.
    kv_position, kv_context : int
        Keys and values of a position, and of as many as the model was made for.
    accelerator : int or None
        Everything in the accelerator's memory with the KV cache of the context; None if the model
        does not fit.
    """

    fp16: int
    linear: int
    draft: int
    overhead: int
    kv_position: int
    kv_context: int
    accelerator: int | None


@dataclass(frozen=True)
class Speed:
    """Predicted speed of the accelerator (`speq.model.prediction`).

    Attributes
    ----------
    clock : float
        In MHz.
    acceptance : float
        Share of the drafted tokens that is taken to be accepted.
    context : int
        Positions in the KV cache.
    plain, draft, verify : int
        Cycles of a pass; verify with the chain's tokens and one more.
    length : int
        The chain's length that is fastest.
    plain_rate, rate : float
        Tokens per second of plain and of speculative decoding.
    speedup : float
    bandwidth : float
        GB/s of the weights' port.
    """

    clock: float
    acceptance: float
    context: int
    plain: int
    draft: int
    verify: int
    length: int
    plain_rate: float
    rate: float
    speedup: float
    bandwidth: float


@dataclass(frozen=True)
class Text:
    """A model's tokenizer and chat format.

    Attributes
    ----------
    tokens : int or None
        Token ids of the model that are text or special tokens; None if it does not say how many it
        has.
    begins : list of str
        Tokens before every text.
    ends : list of str
        Tokens that end a reply.
    chat : str
        How a message becomes a prompt.
    """

    tokens: int | None
    begins: list[str]
    ends: list[str]
    chat: str


@dataclass(frozen=True)
class Report:
    """What is known of a model without computing anything; as text with `str`.

    Attributes
    ----------
    name : str
    container, architecture : str
        What the model is stored as, and what it calls itself.
    supported : bool
        Whether it can be loaded, as far as its headers tell.
    problems : list of str
        Why not: each setting, tensor or file.
    notes : list of str
        What else the loader has to say.
    sizes : dict
        Dimensions by the names of `ModelConfig`.
    stored : dict
        Parameters by the type that they are stored as.
    stored_bytes, parameters : int
    text : Text or None
        None if there is no tokenizer that can be read.
    traits : list of str
        What the architecture has besides plain attention and FFN. This and the following are empty
        or None if the model's settings are not supported.
    array, vector_unit, host : list of str
        What runs where.
    bytes : Bytes or None
    accelerator : dict or None
        Rows, columns, max_k and context that it was compared with.
    limits : list of Limit
        Why it does not fit that accelerator; empty if it does.
    longest : int or None
        Positions that the accelerator has room for.
    speed : Speed or None
        Of an accelerator that is made for the model, if one can be.
    """

    name: str
    container: str
    architecture: str
    supported: bool
    problems: list[str]
    notes: list[str]
    sizes: dict[str, int]
    stored: dict[str, int]
    stored_bytes: int
    parameters: int
    text: Text | None
    traits: list[str] = field(default_factory=list)
    array: list[str] = field(default_factory=list)
    vector_unit: list[str] = field(default_factory=list)
    host: list[str] = field(default_factory=list)
    bytes: Bytes | None = None
    accelerator: dict[str, int] | None = None
    limits: list[Limit] = field(default_factory=list)
    longest: int | None = None
    speed: Speed | None = None

    @property
    def fits(self) -> bool:
        """Whether the model runs on the accelerator that it was compared with."""
        return self.bytes is not None and not self.limits

    def to_dict(self) -> dict[str, Any]:
        """All of it as values for JSON."""
        return {**asdict(self), "fits": self.fits}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def report(
    model: Model | str | Path,
    config: AcceleratorConfig | None = None,
    *,
    context: int | None = None,
    clock: float = 500.0,
    acceptance: float = 0.8,
    latency: int = 48,
) -> Report:
    """What a model would do on an accelerator.

    Of files only headers and the tokenizer are read, whatever their size, also of models that
    cannot be loaded.

    Parameters
    ----------
    model : Model, str or Path
        A loaded model, or what `load` takes.
    config : AcceleratorConfig, optional
        8 x 16 PEs when not given.
    context : int, optional
        Positions that there is to be room for, and behind which speed is predicted; the model's,
        but at most 1024, when not given.
    clock : float
        In MHz.
    acceptance : float
        Share of the drafted tokens that is taken to be accepted.
    latency : int
        Of the accelerator's memory, in cycles.

    Raises
    ------
    CheckpointError
        If there is no such model.
    ValueError
        If a value is out of its range.
    """
    config = config or AcceleratorConfig()
    check_vector_unit(config)
    if not (math.isfinite(clock) and clock > 0):
        raise ValueError(f"clock is {clock}; expected a number of MHz above 0")
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}; expected a probability, 0 to 1")
    if context is not None and context < 1:
        raise ValueError(f"context is {context}; expected at least 1")
    if latency < 1:
        raise ValueError(f"latency is {latency}; expected at least 1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        header = _header(model) if isinstance(model, Model) else read_header(model)
    problems, c = list(header.problems), header.config
    sizes = {name: getattr(c, name) for name in _SIZES} if c else dict(header.sizes)
    if isinstance(model, Model):
        try:
            check_model(model)
        except ValueError as error:
            problems.append(str(error))
    stored: dict[str, int] = {}
    for tensor in header.tensors.values():
        stored[tensor.kind] = stored.get(tensor.kind, 0) + math.prod(tensor.shape)
    result: dict[str, Any] = {
        "name": model.name if isinstance(model, Model) else str(model),
        "container": header.container,
        "architecture": header.architecture,
        "supported": not problems,
        "problems": problems,
        "notes": list(dict.fromkeys(str(warning.message) for warning in caught)),
        "sizes": sizes,
        "stored": stored,
        "stored_bytes": header.bytes,
        "parameters": sum(stored.values()),
        "text": _text(header.tokenizer, sizes) if header.tokenizer else None,
    }
    if c is None:
        return Report(**result)
    context = min(c.context, DEFAULT_CONTEXT) if context is None else context
    limits = _limits(config, c, context)
    result["parameters"] = sum(math.prod(shape) for _, shape in tensor_shapes(c))
    engine = config.engine
    array, vectors, host = _places(c)
    return Report(
        **result,
        traits=_traits(c),
        array=array,
        vector_unit=vectors,
        host=host,
        bytes=_bytes(config, c, context, fits=not limits),
        accelerator={
            "rows": engine.rows,
            "cols": engine.cols,
            "max_k": engine.max_k,
            "context": context,
        },
        limits=limits,
        longest=max(0, min(c.context, engine.max_k - engine.rows)),
        speed=_speed(config, c, latency, context, clock, acceptance),
    )


def _header(model: Model) -> Header:
    """What headers would say of a model in memory."""
    tensors = {name: StoredTensor(tuple(w.shape), "F16") for name, w in model.weights.items()}
    size = sum(weight.nbytes for weight in model.weights.values())
    c = model.config
    return Header("in memory", c.architecture, c, [], {}, tensors, size, model.tokenizer)


def _limits(config: AcceleratorConfig, model: ModelConfig, context: int) -> list[Limit]:
    """Why a model with so many positions of context does not fit the accelerator."""
    found = []
    if context > model.context:
        text = "a shorter --context: the model was made for no more"
        found.append(Limit("context", context, model.context, text))
    for excess in exceeded_limits(config, model, context + config.engine.rows):
        remedy = f"a smaller {excess.what}"
        if excess.parameter == "max_k":
            needed = 1 << (excess.size - 1).bit_length()
            remedy = f"--max-k {needed}"
            if needed > MAX_K:
                remedy = f"none: no accelerator has a max_k above {MAX_K}"
            if excess.what == "KV cache":
                remedy += f", or --context {max(0, excess.limit - config.engine.rows)}"
        elif excess.parameter == "max_o":
            remedy = f"max_o of EngineConfig: at least {excess.size}"
        elif excess.parameter == "query_heads":
            needed = 1 << (excess.size - 1).bit_length()
            remedy = f"query_heads of AcceleratorConfig: {needed}"
        found.append(Limit(excess.what, excess.size, excess.limit, remedy))
    return found


def _bytes(config: AcceleratorConfig, model: ModelConfig, context: int, *, fits: bool) -> Bytes:
    engine = Engine(config.engine.rows, config.engine.cols)
    formats = uniform_formats(model, config.engine.format)
    plain, draft = plain_pass(model, engine), draft_pass(model, engine, formats)
    verify = verify_pass(model, engine, formats, 1)
    position = kv_bytes(model, 0, 1)
    layout = None
    if fits:
        capacity = context + config.engine.rows
        layout = ModelLayout(config, model, linear_names(model), capacity)
    return Bytes(
        fp16=2 * sum(math.prod(shape) for _, shape in tensor_shapes(model)),
        linear=plain.weights,
        draft=draft.weights,
        overhead=verify.weights + verify.groups - plain.weights,
        kv_position=position,
        kv_context=position * model.context,
        accelerator=layout.size if layout else None,
    )


def _speed(
    config: AcceleratorConfig,
    model: ModelConfig,
    latency: int,
    context: int,
    clock: float,
    acceptance: float,
) -> Speed | None:
    engine = config.engine
    try:
        passes = predicted_passes(
            *(model, uniform_formats(model, engine.format)),
            rows=engine.rows,
            cols=engine.cols,
            lanes=config.lanes,
            latency=latency,
            context=context,
        )
    except ValueError:  # no accelerator is made for it
        return None
    p = predict(passes, acceptance, context)
    plain_rate = clock * 1e6 / p.plain
    bandwidth = config.weights.beat_bytes * clock / 1000
    return Speed(
        *(clock, acceptance, context, p.plain, p.draft, p.verify, p.length),
        *(plain_rate, plain_rate * p.speedup, p.speedup, bandwidth),
    )


def _text(tokenizer: Tokenizer, sizes: Mapping[str, int]) -> Text:
    """Of a tokenizer, for as many ids as the model has."""

    def name(token: int) -> str:
        piece = tokenizer.vocabulary.piece(token)
        content = piece.content if piece else f"id {token}"
        return content.decode(errors="replace") if isinstance(content, bytes) else content

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer.chat("hello")
    if tokenizer.chat_template:
        chat = str(caught[0].message) if caught else "the checkpoint's template"
    elif tokenizer.has_chat_format:
        chat = "no template; known by its special tokens"
    else:
        chat = "none: prompts are continued as they are"
    tokens = None
    if size := sizes.get("vocab_size"):
        ids = range(min(size, _MOST_TOKENS))  # the size may be anything
        tokens = sum(tokenizer.vocabulary.piece(token) is not None for token in ids)
    return Text(
        tokens=tokens,
        begins=[name(token) for token in tokenizer.leading],
        ends=[name(token) for token in sorted(tokenizer.stop_ids)],
        chat=chat,
    )


def _places(config: ModelConfig) -> tuple[list[str], list[str], list[str]]:
    """What of a pass runs in the array, in the vector unit and in the host."""
    schedule = pass_schedule(config)
    linears = sum(len(step.names) for step in schedule if isinstance(step, Linears))
    attentions = sum(isinstance(step, Attention) for step in schedule)
    array = [
        f"{linears} linear layers (4-bit draft, FP16 verify)",
        f"both products of {attentions} attentions (FP16)",
        "ranking of the logits",
        "speculation",
    ]
    operations = {step.operation for step in schedule if isinstance(step, Vector)}
    vectors = [text for operation, text in _VECTORS.items() if operation in operations]
    return array, [*vectors, "softmax"], ["tokenizer"]


def _traits(config: ModelConfig) -> list[str]:
    """What a model has besides plain attention and FFN."""
    c = config
    found = []
    if c.kv_heads < c.heads:
        found.append(f"{c.heads // c.kv_heads} query heads share a KV head")
    found.append(f"rotary base {c.rope_base:g}" + (", scaled" if c.rope_divisors else ""))
    if c.unrotated:
        found.append(f"{len(c.unrotated)} blocks without rotary embedding")
    if c.windowed:
        local = f", rotary base {c.local_rope_base:g} there" if c.local_rope_base else ""
        found.append(f"sliding window of {c.sliding_window} in {len(c.windowed)} blocks{local}")
    found.append({"silu": "SiLU gate", "gelu_tanh": "GELU gate"}[c.activation])
    found.append("head tied to the embedding" if c.tied_head else "a head of its own")
    if c.biases:
        found.append("biases of " + ", ".join(name.removesuffix("_proj") for name in c.biases))
    if c.head_norms:
        found.append("norms of queries and keys")
    if c.post_norms:
        found.append("norms before the residual additions")
    scales = {
        "embedding": c.embedding_scale,
        "residual": c.residual_scale,
        "logit": c.logit_scale,
    }
    given = [f"{name} {value:.4g}" for name, value in scales.items() if value != 1]
    if given:
        found.append("factors: " + ", ".join(given))
    return found


def _amount(count: int) -> str:
    """Bytes for people."""
    value, units = float(count), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while value >= 1000 and unit != "PB":
        value, unit = value / 1000, next(units)
    return f"{value:.4g} {unit}"


def _lines(r: Report) -> Iterator[str]:
    """The report as lines of at most 80 characters."""
    yield from _entry("model", r.name)
    yield from _entry("stored as", f"{r.container}, architecture {r.architecture}")
    if r.stored:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in _largest_first(r.stored))
        yield from _entry("weights", f"{kinds}; {_amount(r.stored_bytes)}")
    yield from _entry("supported", "yes" if r.supported else "no")
    for problem in r.problems:
        yield from _entry("", f"- {problem}")
    for note in r.notes:
        yield from _entry("note", note)
    yield ""
    sizes = ", ".join(f"{_SIZES[name]} {size:,}" for name, size in r.sizes.items())
    yield from _entry("dimensions", sizes or "not stated")
    yield from _entry("parameters", f"{r.parameters:,}")
    if r.traits:
        yield from _entry("traits", "; ".join(r.traits))
    if r.text:
        yield from _entry("tokenizer", _text_line(r.text))
        yield from _entry("chat format", r.text.chat)
    b, s, a = r.bytes, r.speed, r.accelerator
    if b is None or a is None:
        return
    yield ""
    yield from _entry("in the array", "; ".join(r.array))
    yield from _entry("vector unit", "; ".join(r.vector_unit))
    yield from _entry("in the host", "; ".join(r.host))
    yield ""
    layers = f"linear layers {_amount(b.linear)}, {b.draft / b.linear:.1%} of it the draft"
    yield from _entry("memory", f"FP16 {_amount(b.fp16)}: {layers}")
    yield from _entry(
        "", f"overhead of the encoding {_amount(b.overhead)}, {b.overhead / b.linear:.2%}"
    )
    yield from _entry(
        "KV cache",
        f"{_amount(b.kv_position)} a position, {_amount(b.kv_context)} "
        f"for all {r.sizes['context']:,}",
    )
    yield ""
    name = f"{a['rows']} x {a['cols']} PEs, max_k {a['max_k']:,}, context {a['context']:,}"
    yield from _entry("accelerator", name)
    if b.accelerator is not None:
        yield from _entry(
            "fits",
            f"yes, in {_amount(b.accelerator)} of memory; "
            f"longest context {r.longest:,} of {r.sizes['context']:,}",
        )
    else:
        yield from _entry("fits", "no")
    for limit in r.limits:
        text = f"- {limit.what} {limit.size:,}, at most {limit.allowed:,}: {limit.remedy}"
        yield from _entry("", text)
    if s is None:
        return
    yield from _entry("cycles", f"a plain pass {s.plain:,}, draft {s.draft:,}, verify {s.verify:,}")
    yield from _entry(
        "speed",
        f"at {s.clock:g} MHz {_rate(s.plain_rate)} tokens/s plainly, {_rate(s.rate)} with drafts "
        f"of {s.length}, if {s.acceptance:.0%} of their tokens are accepted: x {s.speedup:.2f}",
    )
    yield from _entry(
        "",
        f"for each of {s.bandwidth:.4g} GB/s of weights {_rate(s.plain_rate / s.bandwidth)} and "
        f"{_rate(s.rate / s.bandwidth)} tokens/s",
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _largest_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: -entry[1])


def _text_line(text: Text) -> str:
    begins = " ".join(text.begins) or "nothing"
    ends = " ".join(text.ends) or "nothing"
    count = "" if text.tokens is None else f"{text.tokens:,} tokens; "
    return f"{count}texts begin with {begins}, replies end at {ends}"


def _entry(label: str, text: str) -> list[str]:
    """A label and its text, on as many lines as it takes; names of others may hold anything."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    wrapped = textwrap.wrap(safe, _WIDTH - _LABEL, subsequent_indent="  " * text.startswith("- "))
    return [f"{label if not i else '':{_LABEL}}{line}" for i, line in enumerate(wrapped or [""])]
