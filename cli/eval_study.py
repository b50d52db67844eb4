# SPDX-License-Identifier: Apache-2.0
"""The measurements of `speq eval`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.progress import Progress

from speq.cli.eval_report import CONTEXTS, Conditions, ContextFigures, ShownStep, ShownText, Study
from speq.host.cycles import predicted_passes
from speq.host.session import Session
from speq.model.ablation import Materials, draft_names, run_ablation
from speq.model.checkpoint import Model
from speq.model.competitors import collect_stats
from speq.model.emulation import (
    Linear,
    Text,
    decode,
    draft_chains,
    draft_linear,
    float_linear,
    float_weights,
    replay,
    reranked_linear,
)
from speq.model.evaluation import (
    Sample,
    acceptance_by_position,
    best_settings,
    by_kind,
    byte_costs,
    cycle_costs,
    encoded_costs,
    exponent_counts,
    length_curve,
    speedup_at,
    threshold_curve,
)
from speq.model.policy_fit import best_policy
from speq.model.prompts import Prompts
from speq.model.settings import Policy, Settings
from speq.model.tokenizer import TextStream, Tokenizer


def decode_all(
    model: Model, target: Linear, prompts: Sequence[Prompts], conditions: Conditions
) -> list[list[tuple[str, Text]]]:
    """The target's texts with their kinds, for each of some sets of prompts."""
    tokenizer = model.tokenizer
    flat = [
        (kind, tokenizer.encode(prompt) if conditions.raw else tokenizer.encode_chat(prompt))
        for group in prompts
        for kind, texts in group.items()
        for prompt in texts
    ]
    texts = decode(
        model, [ids for _, ids in flat], conditions.max_tokens, target, tokenizer.stop_ids
    )
    found = iter([(kind, text) for (kind, _), text in zip(flat, texts, strict=True)])
    return [[next(found) for texts in group.values() for _ in texts] for group in prompts]


def samples_of(
    model: Model,
    texts: Sequence[tuple[str, Text]],
    linear: Linear,
    conditions: Conditions,
    progress: Progress,
) -> list[Sample]:
    """The draft's chains along all texts."""
    total = sum(len(text.tokens) for _, text in texts)
    task = progress.add_task("drafting", total=total)
    chains = draft_chains(
        model,
        [text for _, text in texts],
        linear,
        conditions.rows - 1,
        max(2, conditions.choices),
        progress=lambda count: progress.advance(task, count),
    )
    return [Sample(kind, text, c) for (kind, text), c in zip(texts, chains, strict=True)]


def shown_texts(
    model: Model, samples: Sequence[Sample], prompts: Prompts, settings: Settings
) -> list[ShownText]:
    """The first sample of each kind of prompts, step by step."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.kind, sample)
    return [
        ShownText(kind, texts[0], shown_steps(model.tokenizer, first[kind], settings))
        for kind, texts in prompts.items()
    ]


def shown_steps(tokenizer: Tokenizer, sample: Sample, settings: Settings) -> list[ShownStep]:
    """Speculation along a sample, with what each token is as text. A character whose bytes are in
    several tokens comes with the last of them."""
    stream, steps, position = TextStream(tokenizer, sample.text.prompt), [], 0
    for step in replay(sample.text, sample.chains, settings):
        refused = sample.chains.choices[position, step.accepted : step.drafted, 0].tolist()
        steps.append(
            ShownStep(
                step.tokens,
                [stream.push(token) for token in step.tokens],
                step.origins,
                [tokenizer.decode([token]) for token in refused],
            )
        )
        position += len(step.tokens)
    if steps:
        steps[-1].texts[-1] += stream.flush()
    return steps


def study(
    session: Session,
    prompts: tuple[Prompts, Prompts],
    conditions: Conditions,
    progress: Progress,
    *,
    ablation: bool,
) -> Study:
    """Decode, draft, choose settings and measure.

    Parameters
    ----------
    session : Session
        The model and its encoding.
    prompts : for calibration and for evaluation
    conditions : Conditions
    progress : Progress
    ablation : bool
        Whether to compare formats and competitors as well.
    """
    model, encoded = session.model, session.encoded
    weights = float_weights(model)
    target = float_linear(weights)
    waiting = progress.add_task("decoding the FP16 texts", total=None)
    calibration, evaluation = decode_all(model, target, prompts, conditions)
    progress.update(waiting, total=1, completed=1)

    costs = encoded_costs(model.config, encoded, conditions.reranked)
    draft = draft_linear(encoded, target)
    if conditions.reranked:
        draft = reranked_linear(draft, weights["head"], conditions.reranked)
    tried = samples_of(model, calibration, draft, conditions, progress)
    samples = samples_of(model, evaluation, draft, conditions, progress)
    rows, choices, reranked = conditions.rows, conditions.choices, conditions.reranked
    settings = {
        "chain": best_settings(tried, costs, rows, 1, reranked=reranked),
        "alternates": best_settings(tried, costs, rows, choices, reranked=reranked),
        "product rule": best_policy(tried, costs, rows, choices, reranked, guesses=False),
        "guesses": best_policy(tried, costs, rows, choices, reranked, free_steps=False),
        "policy": best_policy(tried, costs, rows, choices, reranked),
    }
    chosen = settings["policy"]
    searched = chosen.history if chosen.policy.guesses else 0
    passes = predicted_passes(
        *(model.config, {name: tensor.config for name, tensor in encoded.items()}),
        rows=rows,
        cols=conditions.cols,
        context=max(CONTEXTS),
        drafted_outputs=encoded["head"].drafted_outputs if "head" in encoded else None,
    )
    contexts = []
    for context in CONTEXTS:
        if context < model.config.context:
            moved = byte_costs(costs, rows, context)
            cycles = cycle_costs(passes, context, reranked, searched)
            speeds = (speedup_at(samples, chosen, c, conditions.seed) for c in (moved, cycles))
            contexts.append(ContextFigures(context, *speeds))
    exponents = np.zeros((32, 2), np.int64)
    for name, tensor in encoded.items():
        exponents += exponent_counts(model.linear_weight(name), tensor.config.group)
    compared = None
    if ablation:
        texts = [[*text.prompt, *text.tokens] for _, text in calibration]
        materials = Materials(
            model=model,
            target=target,
            encoded=encoded,
            stats=collect_stats(model, texts),
            calibration=calibration,
            evaluation=evaluation,
            stop_ids=model.tokenizer.stop_ids,
            max_tokens=conditions.max_tokens,
            reranked=conditions.reranked,
        )
        task = progress.add_task("ablation", total=len(draft_names()))

        def show(name: str) -> None:
            progress.update(task, description=f"ablation: {name}", advance=1)

        compared = run_ablation(materials, conditions.seed, progress=show)
    return Study(
        prompts={
            purpose: {kind: len(texts) for kind, texts in group.items()}
            for purpose, group in zip(("calibration", "evaluation"), prompts, strict=True)
        },
        encoded=encoded,
        costs=costs,
        settings=settings,
        figures={
            name: by_kind(samples, chosen, costs, conditions.seed)
            for name, chosen in settings.items()
        },
        acceptance=acceptance_by_position(samples),
        curves={
            name: [length_curve(samples, chosen, costs), threshold_curve(samples, chosen, costs)]
            for name, chosen in settings.items()
            if chosen.policy == Policy()  # the others have no threshold
        },
        contexts=contexts,
        exponents=exponents,
        samples=shown_texts(model, samples, prompts[1], settings["policy"]),
        ablation=compared,
    )
