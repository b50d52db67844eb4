# SPDX-License-Identifier: Apache-2.0
"""Sampled decoding with the driver on the functional model: the golden model's steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from speq.host.accelerator_model import AcceleratorModel
from speq.host.session import Session, memory_size
from speq.model import speculation
from speq.model.encoding import encode_linears
from speq.model.settings import Sampling
from speq.model.speculation import Settings
from tests.host.decoding import GUESSING, SEED, SMALL, check, system
from tests.model.drafted import drafted_model
from tests.model.small_models import random_tokens

#: Rows and draft length, and what else there is.
SETTINGS = [
    Settings(8, 0),
    Settings(8, 7, 0.5, choices=4),
    Settings(8, 1, 0.0, choices=2),
    Settings(8, 5, 0.25, choices=3, reranked=8),
    Settings(8, 3, 1.0, choices=4, reranked=3, policy=GUESSING),
]


@pytest.fixture(scope="module")
def llama() -> Session:
    """A small model on 8 rows."""
    model = drafted_model("llama", SEED)
    encoded = encode_linears(model)
    config = system(replace(SMALL, rows=8))
    size = memory_size(config, model, encoded, SMALL.max_k)
    return Session(model, encoded, AcceleratorModel(config, size))


def sampled(temperature: float, seed: int, min_p: float = 0.0) -> dict[str, object]:
    """Options of a run."""
    generator = torch.Generator().manual_seed(seed)
    return {"sampling": Sampling(temperature, min_p=min_p), "generator": generator}


def test_steps_are_the_golden_models(llama):
    """One text for a seed, whatever the drafts; greedy decoding in between is as ever."""
    for temperature, seed, min_p in ((0.3, 0, 0.0), (0.9, 2**64 - 1, 0.3), (1.5, 2**32, 0.02)):
        prompt = random_tokens(llama.model.config, 5, SEED)
        texts = set()
        for settings in SETTINGS:
            steps = check(llama, prompt, settings, **sampled(temperature, seed, min_p))
            tokens = [token for step in steps for token in step.tokens]
            texts.add(tuple(tokens))
        assert len(texts) == 1
        greedy = check(llama, prompt, SETTINGS[1])
        assert tuple(token for step in greedy for token in step.tokens) not in texts


@pytest.mark.parametrize("wrong", ["position", "seed", "scale"])
def test_wrong_noise_is_found(llama, monkeypatch, wrong):
    """What the steps are compared with tells other noise apart, of draft passes alone as well."""

    def mistaken(logits, positions, scale, seed):
        if wrong == "position":
            positions = [position + (len(positions) > 1) for position in positions]
        elif wrong == "seed":
            seed ^= 1 << 63
        else:
            scale = np.nextafter(scale, np.float32(0))
        return speculation.with_noise(logits, positions, scale, seed)

    monkeypatch.setattr("speq.host.accelerator_model.with_noise", mistaken)
    with pytest.raises(AssertionError, match="SPEQ_SEED"):
        for seed in range(20):
            prompt = random_tokens(llama.model.config, 3, seed)
            check(llama, prompt, SETTINGS[1], **sampled(0.8, seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, "the accelerator samples with temperature and min-p"),
        ({"top_p": 0.9}, "the accelerator samples with temperature and min-p"),
        ({"sampler": "rsd"}, "the accelerator samples with the sampler gumbel; rsd is"),
    ],
)
def test_what_the_accelerator_cannot_do_is_refused(llama, options, message):
    generator = torch.Generator().manual_seed(0)
    run = llama.generate([1], max_tokens=2, sampling=Sampling(0.8, **options), generator=generator)
    with pytest.raises(ValueError, match=message):
        next(run)
    with pytest.raises(ValueError, match="sampled decoding needs a generator"):
        llama.generate([1], max_tokens=2, sampling=Sampling(0.8))
