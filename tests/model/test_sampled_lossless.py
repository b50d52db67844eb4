# SPDX-License-Identifier: Apache-2.0
"""Contract C4 on real models, sampled: with a seed, speculation changes no token and no logit bit,
and over seeds, texts have the probabilities that the model gives them.

`test_speculation.py` has the same on small models, and bugs that such comparisons must find.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from speq.model.checkpoint import CheckpointError, Model
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.prompts import shipped_prompts
from speq.model.speculation import (
    Sampling,
    Settings,
    Statistics,
    TextCache,
    distribution,
    generate,
)
from speq.model.transformer import KVCache, forward, prepare_draft_linears
from tests.model.test_speculation import LEAST_P_VALUE, SEED, p_value

pytestmark = pytest.mark.slow


def check_sampled(model: Model, prompts: list[list[int]], tokens: int) -> None:
    """Compare speculative with plain sampling behind each prompt, with another seed, temperature,
    truncation, number of rows, draft length and number of choices each time."""
    layers = prepare_draft_linears(encode_linears(model))
    statistics = Statistics()
    compared = 0
    for number, prompt in enumerate(prompts):
        rows = (4, 8, 16)[number % 3]
        settings = Settings(
            rows,
            1 + number % min(7, rows - 1),
            threshold=(0.0, 0.5)[number % 2],
            choices=1 + number % 4,
            reranked=(0, 8)[number // 2 % 2],
        )
        sampling = Sampling((0.3, 0.6, 0.9, 1.2, 1.5)[number % 5], min_p=(0.0, 0.05)[number % 2])
        made = []
        for drafted in (None, layers):
            generator = torch.Generator().manual_seed(1000 + number)
            steps = list(
                generate(
                    *(model, prompt, drafted),
                    max_tokens=tokens,
                    settings=settings,
                    sampling=sampling,
                    generator=generator,
                )
            )
            logits = torch.cat([step.logits for step in steps]).view(torch.int32)
            made.append(([token for step in steps for token in step.tokens], logits))
        assert made[0][0] == made[1][0], f"prompt {number}: tokens differ"
        assert torch.equal(made[0][1], made[1][1]), f"prompt {number}: logits differ"
        assert len(made[0][0]) == tokens
        for step in steps:
            statistics.add(step)
        compared += tokens
        print(f"{model.name}, prompt {number + 1} of {len(prompts)}: {compared} tokens", flush=True)
    print(f"{model.name}: {compared} tokens and their logits are bit-identical; {statistics}")
    assert statistics.alternate_hits > 0 and 0.2 < statistics.match_rate < 0.99


def test_tiny_5000_tokens():
    model = load_model("tiny")
    texts = itertools.chain.from_iterable(shipped_prompts("evaluation", raw=True).values())
    prompts = [model.tokenizer.encode(text) for text in itertools.islice(texts, 50)]
    assert len(prompts) >= 40
    check_sampled(model, prompts, -(-5000 // len(prompts)))


def test_smollm2_500_tokens():
    try:
        model = load_model("smollm2")
    except CheckpointError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    kinds = shipped_prompts("evaluation")
    texts = [text for prompts in kinds.values() for text in prompts[:4]]
    prompts = [model.tokenizer.encode_chat(text) for text in texts]
    assert len(prompts) >= 15
    check_sampled(model, prompts, -(-500 // len(prompts)))


def three_tokens(
    model: Model, prompt: list[int], sampling: Sampling
) -> dict[tuple[int, ...], float]:
    """Exact probabilities of all texts of three tokens behind a prompt."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in texts.items():
            tokens = [*prompt, *text]
            logits = forward(model, tokens, KVCache(model.config, len(tokens)))[-1:]
            for token, p in enumerate(distribution(logits, sampling)[0].tolist()):
                if p:
                    longer[*text, token] = chance * p
        texts = longer
    return texts


def test_texts_of_three_tokens_have_their_probabilities():
    """Of `tiny`, sampled speculatively with a thousand seeds, by the chi-square test."""
    model = load_model("tiny")
    layers = prepare_draft_linears(encode_linears(model))
    prompt = model.tokenizer.encode("Once upon a time, there was a")
    sampling, settings = Sampling(1.2, top_k=3), Settings(4, 2, choices=2)
    chances = three_tokens(model, prompt, sampling)
    assert len(chances) == 27 and sum(chances.values()) == pytest.approx(1)
    counts, statistics = dict.fromkeys(chances, 0), Statistics()
    cache = TextCache(model.config)
    for seed in range(1000):
        text: list[int] = []
        for step in generate(
            *(model, prompt, layers),
            max_tokens=3,
            settings=settings,
            sampling=sampling,
            generator=torch.Generator().manual_seed(1000 * SEED + seed),
            text=cache,
        ):
            text += step.tokens
            statistics.add(step)
        counts[tuple(text)] += 1
    found = p_value(*(torch.tensor([[*row.values()]]) for row in (counts, chances)))
    print(f"texts of three tokens of tiny: p = {found:.3f}; {statistics}")
    assert statistics.accepted > 300 and statistics.alternate_hits > 50
    assert found > LEAST_P_VALUE
