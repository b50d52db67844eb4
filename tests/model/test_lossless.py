# SPDX-License-Identifier: Apache-2.0
"""Contract C4 on real models: speculative decoding changes no token and no logit bit.

The slow tests are the full proof: 5,000 tokens of `tiny` and 1,000 of SmolLM2. What they compare
is caught when it goes wrong: test_speculation.py keeps deliberate bugs that such a comparison must
find.
"""

import itertools

import pytest
import torch

from speq.model.checkpoint import CheckpointError, Model, linear_names
from speq.model.format import EncodedTensor, encode
from speq.model.loaders import load_model
from speq.model.number_format import GROUP_SIZES, FormatConfig
from speq.model.prompts import shipped_prompts
from speq.model.speculation import Settings, Statistics, generate
from speq.model.transformer import prepare_draft_linears


def encode_model(model: Model) -> dict[str, EncodedTensor]:
    """Every freedom of the format in use: all groups and splits, and a head that drafts three
    quarters of the vocabulary."""
    encoded = {}
    for i, name in enumerate(linear_names(model.config)):
        weights = model.linear_weight(name)
        config = FormatConfig(GROUP_SIZES[i % 3], split=1 + i % 3)
        rows = len(weights) * 3 // 4 if name == "head" else None
        encoded[name] = encode(weights, config, name=name, drafted_outputs=rows)
    return encoded


def check_lossless(model: Model, prompts: list[list[int]], tokens: int, settings: Settings) -> None:
    """Compare all bits of speculative and plain decoding of `tokens` tokens behind each prompt."""
    layers = prepare_draft_linears(encode_model(model))
    statistics = Statistics()
    compared = 0
    for number, prompt in enumerate(prompts):
        plain = list(generate(model, prompt, None, max_tokens=tokens))
        steps = list(generate(model, prompt, layers, max_tokens=tokens, settings=settings))
        expected, made = (
            [token for step in some for token in step.tokens] for some in (plain, steps)
        )
        assert made == expected, f"prompt {number}: tokens differ"
        assert len(made) == tokens
        expected, made = (torch.cat([step.logits for step in some]) for some in (plain, steps))
        same = (made.view(torch.int32) == expected.view(torch.int32)).all(dim=1)
        assert same.all(), f"prompt {number}: logits of token {int((~same).nonzero()[0])} differ"
        for step in steps:
            statistics.add(step)
        compared += len(same)
        print(
            f"{model.name}, prompt {number + 1} of {len(prompts)}: {len(same)} tokens", flush=True
        )
    print(f"{model.name}: {compared} tokens and their logits are bit-identical; {statistics}")
    # Speculation took place, and not everything was accepted.
    assert statistics.alternate_hits > 0
    assert 0.3 < statistics.match_rate < 0.99
    assert statistics.tokens_per_pass > 1.5


def story_prompts(model: Model, count: int) -> list[list[int]]:
    texts = itertools.chain.from_iterable(shipped_prompts("evaluation", raw=True).values())
    return [model.tokenizer.encode(text) for text in itertools.islice(texts, count)]


def test_tiny():
    model = load_model("tiny")
    check_lossless(model, story_prompts(model, 4), 40, Settings(threshold=1.0))


@pytest.mark.slow
def test_tiny_5000_tokens():
    model = load_model("tiny")
    prompts = story_prompts(model, 40)
    assert len({tuple(prompt) for prompt in prompts}) == 40
    check_lossless(model, prompts, 125, Settings(threshold=1.0))


@pytest.mark.slow
def test_smollm2_1000_tokens():
    try:
        model = load_model("smollm2")
    except CheckpointError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    kinds = shipped_prompts("evaluation")
    texts = [text for prompts in kinds.values() for text in prompts[:3]]
    prompts = [model.tokenizer.encode_chat(text) for text in texts]
    assert len(prompts) >= 10
    check_lossless(model, prompts, -(-1000 // len(prompts)), Settings(threshold=1.0))
