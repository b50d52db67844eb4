# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: greedy loses no bit (C4), sampled has exactly the target's distribution.

The greedy checks compare with a plain decoder of a few lines that shares only the forward pass. The
sampled ones enumerate toy distributions exactly and test draws with Pearson's chi-square. Both have
to notice deliberate bugs.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speq.model import speculation, transformer
from speq.model.arith import WeightOperand, verify_gemm
from speq.model.checkpoint import Model, linear_names
from speq.model.draft_tree import Origin, Proposal
from speq.model.format import encode
from speq.model.number_format import FormatConfig
from speq.model.settings import Policy
from speq.model.speculation import (
    Sampling,
    Settings,
    Statistics,
    Step,
    accept,
    argmax,
    choose,
    distribution,
    draft,
    generate,
    pass_mask,
    recursive_rejection,
    sample,
)
from speq.model.transformer import KVCache, NonFiniteError, forward, prepare_draft_linears
from speq.model.vector_ops import ranked
from tests.model.small_models import overflowing, random_tokens, random_weights, small_config

SEED = int(os.environ.get("SPEQ_SEED", "0"))
TOKENS = 24
PROMPTS = 3
GUESSING = Policy(
    chain_costs=(20, 18, 16, 14, 12, 10, 9, 8, 6, 4, 2, 1, 0, 0, 0, 0), guess_costs=(30, 20, 8, 4)
)
#: Draft lengths, thresholds and trees; a logit's standard deviation is about 1 in these models.
SETTINGS = {
    "chain and no spare rows": Settings(),
    "chain with early exit": Settings(threshold=0.4, choices=1),
    "alternates with early exit": Settings(threshold=0.4),
    "alternates behind a short chain": Settings(draft_length=3),
    "two choices": Settings(rows=6, draft_length=3, threshold=0.2, choices=2),
    "one draft token and all alternates": Settings(rows=16, draft_length=1, choices=16),
    "one draft token alone": Settings(rows=2),
    "exit after every token": Settings(threshold=math.inf),
    "many rows": Settings(rows=16, threshold=0.2),
    "one row": Settings(rows=1),
}
#: With guesses from the text, which models with few tokens repeat.
GUESSES = {
    "behind short chains": Settings(draft_length=2, policy=GUESSING),
    "behind unlikely chains": Settings(16, policy=replace(GUESSING, limit=25)),
    "instead of draft passes": Settings(policy=replace(GUESSING, guess_limit=20)),
    "from a short history": Settings(policy=replace(GUESSING, guess_limit=40), history=8),
}


def generator(offset: int = 0) -> torch.Generator:
    print(f"SPEQ_SEED={SEED}")
    return torch.Generator().manual_seed(SEED + offset)


def bits(logits: torch.Tensor) -> torch.Tensor:
    return logits.contiguous().view(torch.int32)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def subject(request) -> SimpleNamespace:
    return random_subject(request.param)


@pytest.fixture(scope="module")
def talkative() -> SimpleNamespace:
    """One that has so few tokens that it repeats itself."""
    return random_subject("llama", vocab_size=6)


def random_subject(architecture: str, vocab_size: int = 64) -> SimpleNamespace:
    """A small random model whose draft agrees with it often, but not always.

    With its own head it does not just repeat the last token, and linear layers that are larger
    than usual make more of the draft's errors.
    """
    config = small_config(
        architecture,
        tied_head=False,
        vocab_size=vocab_size,
        hidden=32,
        ffn_hidden=48,
        heads=2,
        kv_heads=1,
        context=48,
    )
    scale = {"llama": 1.5, "gemma3": 1.0}[architecture]
    weights = {
        name: (w * scale if name.endswith("_proj") else w).half()
        for name, w in random_weights(config, SEED).items()
    }
    model = Model(f"random {architecture}", config, weights, tokenizer=None)
    encoded = {
        name: encode(model.linear_weight(name), FormatConfig(), name=name)
        for name in linear_names(config)
    }
    prompts = [random_tokens(config, 1 + 5 * i, SEED + i) for i in range(PROMPTS)]
    return SimpleNamespace(
        model=model, layers=prepare_draft_linears(encoded), prompts=prompts, plain={}
    )


def reference(subject: SimpleNamespace, number: int) -> tuple[list[int], torch.Tensor]:
    """Plain decoding behind a prompt of the subject, made once."""
    if number not in subject.plain:
        subject.plain[number] = plain_decoding(subject.model, subject.prompts[number], TOKENS)
    return subject.plain[number]


def plain_decoding(model: Model, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding one token at a time: tokens and the logits that each was chosen by."""
    cache = KVCache(model.config, len(prompt) + count)
    for token in prompt[:-1]:
        forward(model, [token], cache)
    tokens, logits = [prompt[-1]], []
    for _ in range(count):
        row = forward(model, [tokens[-1]], cache)[0].tolist()
        tokens.append(row.index(max(row)))
        logits.append(row)
    return tokens[1:], torch.tensor(logits)


def check_lossless(subject: SimpleNamespace, settings: Settings) -> list[Step]:
    """Compare tokens and logit bits of speculative and plain decoding; returns all steps."""
    steps = []
    for number, prompt in enumerate(subject.prompts):
        expected, expected_logits = reference(subject, number)
        made = list(
            generate(subject.model, prompt, subject.layers, max_tokens=TOKENS, settings=settings)
        )
        tokens = [token for step in made for token in step.tokens]
        logits = torch.cat([step.logits for step in made])
        differ = [i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b]
        assert not differ, f"SPEQ_SEED={SEED}: token {differ[0]} is not the target's"
        wrong = (bits(logits) != bits(expected_logits)).any(dim=1).nonzero()
        assert not len(wrong), f"SPEQ_SEED={SEED}: logits of token {int(wrong[0])} differ"
        steps += made
    return steps


# Greedy decoding.


def test_greedy_decoding_loses_no_bit(subject):
    """All settings and prompts; and every branch of the algorithm was taken."""
    steps, total = [], Statistics()
    for name, settings in SETTINGS.items():
        made = check_lossless(subject, settings)
        statistics = Statistics()
        for step in made:
            statistics.add(step)
            total.add(step)
        print(f"{name}: {statistics}")
        assert statistics.committed == PROMPTS * TOKENS
        assert statistics.draft_passes == sum(step.drafted for step in made)
        assert all(step.rows <= settings.rows for step in made)
        assert all(step.drafted <= settings.length for step in made)
        steps += made
    assert 0.2 < total.match_rate < 0.9
    cases = {
        "refused at once": [
            s for s in steps if s.drafted and not s.accepted and not s.alternate_hit
        ],
        "refused later": [s for s in steps if 0 < s.accepted < s.drafted and not s.alternate_hit],
        "everything accepted": [s for s in steps if s.accepted == s.drafted >= 2],
        "first alternates hit": [s for s in steps if s.alternate_hit and not s.accepted],
        "later alternates hit": [s for s in steps if s.alternate_hit and s.accepted],
        "alternates in vain": [s for s in steps if s.alternates and not s.alternate_hit],
        "early exit": [s for s in steps if s.margins and s.margins[-1] < 0.2 and s.drafted < 6],
    }
    counts = {name: len(found) for name, found in cases.items()}
    print(counts)
    assert all(counts.values()), counts
    for step in steps:
        assert len(step.tokens) <= step.accepted + 1 + step.alternate_hit


def test_guesses_lose_no_bit(talkative):
    """And guesses were right and wrong in every place."""
    steps = [s for settings in GUESSES.values() for s in check_lossless(talkative, settings)]
    cases = {
        "behind the chain": [s for s in steps if s.guess_hits and s.accepted],
        "behind an alternate": [s for s in steps if s.guess_hits and s.alternate_hit],
        "without a draft pass": [s for s in steps if s.guess_hits and not s.drafted],
        "in vain": [s for s in steps if s.guesses and not s.guess_hits],
        "in part": [s for s in steps if 1 < s.guess_hits < s.guesses],
    }
    counts = {name: len(found) for name, found in cases.items()}
    print(counts)
    assert all(counts.values()), counts
    for step in steps:
        assert len(step.tokens) <= step.accepted + 1 + step.alternate_hit + step.guess_hits
        assert len(step.origins) == len(step.tokens) and step.rows <= 16
        assert step.origins.count("guess") == step.guess_hits
        assert len(step.margins) == step.drafted


@pytest.mark.parametrize("count", [1, 3, 8])
def test_drafts_are_ranked_by_exact_logits(subject, count, monkeypatch):
    """Of the draft head's best tokens, computed here by themselves; and decoding loses no bit."""
    head = subject.model.linear_weight("head")
    seen, better = [], 0

    def recorded(model, tokens, cache, *, reranked=0, draft=None, **options):
        if draft is None:
            return forward(model, tokens, cache, **options)
        start, inputs = cache.length, {}
        own = forward(model, tokens, cache, draft=draft, capture=inputs.__setitem__)
        cache.truncate(start)
        logits = forward(model, tokens, cache, draft=draft, reranked=reranked)
        assert reranked == count
        seen.append((own[0], inputs["head"], logits[0]))
        return logits

    monkeypatch.setattr(speculation, "forward", recorded)
    steps = check_lossless(subject, Settings(6, None, 0.2, reranked=count))
    assert max(s.alternates for s in steps) <= (count - 1) * 5
    assert any(s.alternate_hit for s in steps) == (count > 1)
    for own, x, logits in seen:
        values = own.tolist()
        best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
        exact = {i: float(verify_gemm(x, head[i : i + 1])) for i in best}
        assert {i: v for i, v in enumerate(logits.tolist()) if v > -math.inf} == exact
        better += max(exact, key=lambda i: (exact[i], -i)) != best[0]
    assert bool(better) == (count > 1)


def test_sampled_drafts_are_ranked_with_their_noise(subject):
    """Those whose logits are computed exactly are the best with noise, not the likeliest."""
    model, prompt = subject.model, subject.prompts[0]
    noise = 3 * torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(SEED))

    def logits_of(**options):
        cache = KVCache(model.config, len(prompt))
        return forward(model, prompt, cache, draft=subject.layers, **options)

    own = logits_of()
    ranked_by_noise = logits_of(reranked=3, scores=lambda logits: logits + noise)
    for row, drafted in zip(ranked_by_noise, own, strict=True):
        best = ranked(drafted + noise, 3)
        assert set((row > -math.inf).nonzero()[:, 0].tolist()) == set(best.tolist())
    assert not torch.equal(ranked_by_noise > -math.inf, logits_of(reranked=3) > -math.inf)


def test_plain_decoding_needs_no_draft_model(subject):
    prompt = subject.prompts[1]
    expected, expected_logits = reference(subject, 1)
    steps = list(generate(subject.model, prompt, None, max_tokens=TOKENS))
    assert [step.tokens for step in steps] == [[token] for token in expected]
    assert torch.equal(bits(torch.cat([step.logits for step in steps])), bits(expected_logits))
    assert all(step.drafted == step.alternates == 0 for step in steps)


def test_decoding_ends_where_it_should(subject):
    prompt = subject.prompts[0]
    expected, _ = reference(subject, 0)

    def decode(count: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
        steps = generate(subject.model, prompt, subject.layers, max_tokens=count, stop_ids=stop_ids)
        made = list(steps)
        assert all(len(s.tokens) == len(s.logits) >= s.accepted for s in made)
        return [token for step in made for token in step.tokens]

    for count in (0, 1, 2, 9, 10):
        assert decode(count) == expected[:count]
    for stop in expected[:6]:
        assert decode(TOKENS, frozenset([stop])) == expected[: expected.index(stop) + 1]
    context = subject.model.config.context
    assert len(decode(10_000)) == context - len(prompt)
    too_long = [1] * context
    for bad in ([], too_long):
        with pytest.raises(ValueError, match=f"prompt has {len(bad)} tokens; expected 1 to"):
            next(generate(subject.model, bad, None, max_tokens=5))


# Deliberate bugs that the greedy check must notice.


def batch_dependent_gemm(x: torch.Tensor, w: torch.Tensor | WeightOperand) -> torch.Tensor:
    """Sums K in two halves, each rounded, if there are several tokens."""
    if len(x) == 1:
        return transformer_verify_gemm(x, w)
    values = w.values if isinstance(w, WeightOperand) else w
    middle = -(-x.shape[1] // 2)
    halves = [
        transformer_verify_gemm(x[:, part], values[:, part])
        for part in (slice(middle), slice(middle, None))
        if x[:, part].numel()
    ]
    return sum(halves, torch.zeros(()))


def one_token_too_many(proposal: Proposal, logits: torch.Tensor, *_) -> tuple[list, list]:
    """Accepts the first chain token that the target refuses."""
    tokens, rows = accept(proposal, logits)
    position = len(rows) - 1
    if rows[-1] == position < len(proposal.chain):
        tokens = [*tokens[:-1], proposal.chain[position], argmax(logits[position + 1])]
        rows = [*rows, position + 1]
    return tokens, rows


def verify_leaving_draft_entries(model, cache, root, proposal) -> torch.Tensor:
    """Leaves the draft's keys and values of root and chain where the verify pass wrote its own."""
    start, count = cache.length, len(proposal.chain)
    stale = [t[:, :, start : start + count].clone() for t in (cache.keys, cache.values)]
    logits = plain_verify(model, cache, root, proposal)
    for tensor, entries in zip((cache.keys, cache.values), stale, strict=True):
        tensor[:, :, start : start + count] = entries
    return logits


def mask_of_the_uncle(start: int, parents: list[int]) -> torch.Tensor:
    """Rows attend to the row before their parent, not to the parent."""
    mask = plain_mask(start, parents)
    for row, parent in enumerate(parents):
        if parent > 1:
            mask[row, start + parent] = False
    return mask


def first_child_only(tree: Proposal, row: int) -> list[int]:
    """Takes rows for children whose parent is the next row."""
    return [i + 1 for i, parent in enumerate(tree.parents) if parent == row + 1]


def keep_without_moving(cache: KVCache, start: int, slots: list[int]) -> None:
    """Forgets to move an accepted alternate's entry behind the chain."""
    cache.truncate(start + len(slots))


transformer_verify_gemm = transformer.verify_gemm
plain_verify = speculation.verify
plain_mask = speculation.pass_mask
BUGS = {
    "batch-dependent sum": (transformer, "verify_gemm", batch_dependent_gemm, "logits"),
    "off by one in acceptance": (speculation, "accept", one_token_too_many, "token"),
    "stale draft K/V": (speculation, "verify", verify_leaving_draft_entries, "token|logits"),
    "alternates' K/V not moved": (KVCache, "keep", keep_without_moving, "token|logits"),
    "a parent hidden": (speculation, "pass_mask", mask_of_the_uncle, "token|logits"),
    "a wrong parent": (Proposal, "children", first_child_only, "token|logits"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_greedy_check_notices_bugs(subject, bug, monkeypatch):
    owner, name, broken, message = BUGS[bug]
    settings = Settings(policy=replace(GUESSING, limit=25))
    monkeypatch.setattr(subject, "plain", {})  # plain decoding may have the bug, too
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError, match=message):
        check_lossless(subject, settings)


# Results that are not finite.

OVERFLOWING = ("block.0.down_proj", "block.1.scores of k", "block.1.values", "head")
#: Of those of `SETTINGS`, with chains and alternates of many lengths.
ENDING = ["chain with early exit", "alternates with early exit", "two choices", "many rows"]

Ended = tuple[list[int], tuple[str, int] | None]


def plain_end(model: Model, prompt: list[int], count: int) -> Ended:
    """Tokens of plain decoding, and layer and position of a result that is not finite."""
    cache = KVCache(model.config, len(prompt) + count)
    tokens = []
    try:
        for token in prompt[:-1]:
            forward(model, [token], cache)
        while len(tokens) < count:
            row = forward(model, [(prompt + tokens)[-1]], cache)[0].tolist()
            tokens.append(row.index(max(row)))
    except NonFiniteError as error:
        return tokens, (error.layer, error.position)
    return tokens, None


def speculative_end(subject, model: Model, layers, prompt: list[int], **options) -> tuple:
    """The same of `generate`, with its statistics and the error."""
    tokens, statistics, error = [], Statistics(), None
    try:
        for step in generate(model, prompt, layers, max_tokens=TOKENS, **options):
            tokens += step.tokens
            statistics.add(step)
    except NonFiniteError as caught:
        error = caught
    return tokens, error and (error.layer, error.position), statistics, error


def encoded_layers(model: Model) -> dict:
    return prepare_draft_linears(
        {
            name: encode(model.linear_weight(name), FormatConfig(), name=name)
            for name in linear_names(model.config)
        }
    )


def ordinary_text(subject, prompt: list[int], layer: str) -> list[int]:
    """What models decode that `layer` overflows in, before they meet their token."""
    for absent in set(range(64)) - set(prompt):
        model = overflowing(subject.model, absent, layer, scale=2.0**-6)
        text, _ = plain_end(model, prompt, TOKENS)
        if absent not in text:
            return text
    raise AssertionError("every token occurs")


@pytest.mark.parametrize("layer", OVERFLOWING)
def test_decoding_ends_where_plain_decoding_does(subject, layer):
    """The tokens before are all committed; the pass, the position and the layer are named."""
    if "scores" in layer and "gemma" in subject.model.name:
        pytest.skip("it norms its keys")
    prompt = subject.prompts[1]
    text = ordinary_text(subject, prompt, layer)
    late = next(i for i in range(8, TOKENS) if text[i] not in prompt + text[:i])
    for number in {late, 0 if text[0] not in prompt else late}:
        model = overflowing(subject.model, text[number], layer)
        layers = encoded_layers(model)
        expected = text[: number + 1], (layer.split(" ")[0], len(prompt) + number)
        assert plain_end(model, prompt, TOKENS) == expected
        for draft_layers, names in ((layers, ENDING), (None, ["one row"])):
            for name in names:
                *got, statistics, error = speculative_end(
                    subject, model, draft_layers, prompt, settings=SETTINGS[name]
                )
                assert tuple(got) == expected, name
                assert error.kind == "verify" and error.step == statistics.verify_passes + 1
                assert f"in the verify pass of step {error.step}: " in str(error)


def test_the_prompt_may_end_decoding(subject):
    for place in range(4):
        prompt = [1, 2, 3, 4]
        model = overflowing(subject.model, prompt[place], "block.1.values")
        layers = encoded_layers(model)
        tokens, where, _, error = speculative_end(subject, model, layers, prompt)
        assert (tokens, where) == ([], ("block.1.values", place))
        expected = ("prompt", None) if place < 3 else ("verify", 1)
        assert (error.kind, error.step) == expected


def test_drafts_that_are_not_finite_end_nothing(subject):
    """Tokens that are drafted and refused; and those that only the draft cannot compute."""
    layer, settings = "block.0.down_proj", SETTINGS["alternates with early exit"]
    prompt = subject.prompts[1]
    text = ordinary_text(subject, prompt, layer)
    total = Statistics()
    for token in set(range(64)) - set(prompt + text[:-1]):
        model = overflowing(subject.model, token, layer)
        *got, statistics, _ = speculative_end(
            subject, model, encoded_layers(model), prompt, settings=settings
        )
        assert got == [text, None]
        total.repeated += statistics.repeated
        if total.repeated >= 3:
            break
    assert total.repeated

    drafts_begin = False
    for token in dict.fromkeys(text):
        model = overflowing(subject.model, token, layer, scale=2.0**-6)
        layers = encoded_layers(overflowing(subject.model, token, layer))
        steps = list(generate(model, prompt, layers, max_tokens=TOKENS, settings=Settings()))
        assert [t for step in steps for t in step.tokens] == plain_end(model, prompt, TOKENS)[0]
        assert not any(step.repeated for step in steps)
        roots = [prompt[-1], *(step.tokens[-1] for step in steps[:-1])]
        assert all(
            (root == token) <= (step.drafted == 0) for root, step in zip(roots, steps, strict=True)
        )
        drafts_begin |= token in roots
        if drafts_begin:
            break
    assert drafts_begin


def test_statistics_count_repetitions(subject, monkeypatch):
    """Behind a verify pass that is not finite, decoding is plain while it follows the chain."""
    prompt, settings = subject.prompts[1], Settings(rows=4, choices=1)
    expected, _ = reference(subject, 1)
    passes = []

    def verify_failing_once(model, cache, root, proposal):
        passes.append(proposal.chain)
        if len(passes) == 1:
            raise NonFiniteError("verify", "head", 0)
        return plain_verify(model, cache, root, proposal)

    monkeypatch.setattr(speculation, "verify", verify_failing_once)
    steps = list(
        generate(subject.model, prompt, subject.layers, max_tokens=TOKENS, settings=settings)
    )
    assert [t for step in steps for t in step.tokens] == expected
    followed = next(i for i in range(4) if passes[0][i:] == [] or passes[0][i] != expected[i])
    plain = min(followed + 1, 3)  # one for each position that is compared
    assert [bool(chain) for chain in passes[: plain + 2]] == [True, *[False] * plain, True]
    assert [step.repeated for step in steps] == [True, *[False] * (len(steps) - 1)]


# Ties, alternates, settings.


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 3.0, -math.inf])
    assert ranked(logits, 6).tolist() == [1, 3, 5, 2, 4, 0]
    for count in range(1, 7):
        assert ranked(logits, count).tolist() == [1, 3, 5, 2, 4, 0][:count]
    assert argmax(torch.zeros(100_000)) == 0
    many = torch.randint(0, 4, (5000,), generator=generator()).float()
    expected = sorted(range(5000), key=lambda i: (-many[i].item(), i))
    assert ranked(many, 900).tolist() == expected[:900]
    assert ranked(many, 9999).tolist() == expected


def test_nan_is_never_the_largest():
    nan = math.nan
    assert ranked(torch.tensor([nan, -5.0, nan, 2.0]), 2).tolist() == [3, 1]
    assert argmax(torch.tensor([nan, nan])) == 0
    assert argmax(torch.tensor([nan, 1.0, math.inf])) == 2


def test_gaps_that_are_nan_are_the_largest(monkeypatch):
    """Equal infinities and NaN logits: the chain goes on, and such alternates come last."""
    inf, nan = math.inf, math.nan
    passes = iter([[inf, inf, 2.0, 1.0], [nan, nan, nan, nan], [-inf, 9.0, nan, 4.0]])
    cache = SimpleNamespace(length=5, truncate=lambda length: None)
    monkeypatch.setattr(speculation, "forward", lambda *_, **__: torch.tensor([next(passes)]))
    settings = Settings(rows=9, draft_length=3, threshold=0.0)
    proposal = draft(None, cache, [7], {}, settings, 20)
    assert proposal.margins == [inf, inf, 5.0]
    assert proposal.chain == [0, 0, 1]
    # The third position's alternates are 5 and, 9 and NaN being the best and no number, far below.
    assert proposal.tokens[3:] == [3, 1, 2, 3, 1]
    assert proposal.parents[3:] == [2, 0, 0, 0, 1]


def test_acceptance_walks_the_tree():
    """Chain 5 6 7 with alternates 1, 2 at the first and 3 at the third position."""
    chain, alternate = Origin.CHAIN, Origin.ALTERNATE
    origins = [chain] * 3 + [alternate] * 3
    proposal = Proposal([5, 6, 7, 1, 2, 3], [0, 1, 2, 0, 0, 2], origins, [0.0] * 3)
    assert proposal.chain == [5, 6, 7] and proposal.rows == 7
    assert [proposal.children(row) for row in range(4)] == [[1, 4, 5], [2], [3, 6], []]
    assert proposal.depths == [0, 1, 2, 3, 1, 1, 3]
    assert [proposal.path(row) for row in (0, 3, 5, 6)] == [[0], [0, 1, 2, 3], [0, 5], [0, 1, 2, 6]]

    def accepted(*targets: int) -> tuple[list[int], list[int]]:
        """With the target's token for each row: root, 5, 6, 7, 1, 2, 3."""
        return accept(proposal, torch.nn.functional.one_hot(torch.tensor(targets), 10).float())

    assert accepted(5, 6, 7, 9, 0, 0, 0) == ([5, 6, 7, 9], [0, 1, 2, 3])
    assert accepted(8, 6, 7, 9, 0, 0, 0) == ([8], [0])
    assert accepted(2, 6, 7, 9, 0, 4, 0) == ([2, 4], [0, 5])
    assert accepted(1, 6, 7, 9, 6, 0, 0) == ([1, 6], [0, 4])  # nothing follows an alternate
    assert accepted(5, 1, 7, 9, 0, 0, 0) == ([5, 1], [0, 1])
    assert accepted(5, 6, 3, 9, 0, 0, 8) == ([5, 6, 3, 8], [0, 1, 2, 6])


def test_masks_follow_the_parents():
    """Root, chain 1 2, an alternate beside 2, and guesses behind both."""
    parents = [0, 0, 1, 1, 2, 3, 5]
    paths = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 2, 4], [0, 1, 3, 5], [0, 1, 3, 5, 6]]
    mask = pass_mask(4, parents)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [
        [0, 1, 2, 3, *(4 + place for place in path)] for path in paths
    ]


def test_statistics_count():
    statistics = Statistics()
    assert math.isnan(statistics.match_rate) and math.isnan(statistics.speedup())
    logits = torch.zeros(4, 1)
    statistics.add(Step([1, 2, 3, 4], logits, 4, 2, 3, True, [1.0] * 4))  # 2, alternate, target
    statistics.add(Step([5, 6], logits[:2], 1, 1, 0, False, [1.0]))
    statistics.add(Step([7, 8], logits[:2], 6, 2, 0, False, [1.0] * 6))  # cut by a stop token
    assert (statistics.verify_passes, statistics.draft_passes, statistics.committed) == (3, 11, 8)
    assert statistics.match_rate == 5 / 6
    assert statistics.tokens_per_pass == 8 / 3
    assert (statistics.alternates, statistics.alternate_hits) == (3, 1)
    assert statistics.speedup() == 8 / (11 / 4 + 3)
    assert statistics.speedup(0.5, 1.5) == 8 / (5.5 + 4.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"draft_length": 8}, "draft length is 8; expected 0 to rows - 1 = 7"),
        ({"draft_length": -1}, "draft length is -1"),
        ({"threshold": -0.5}, r"threshold is -0\.5"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"choices": 0}, "choices is 0"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Settings(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-320}, r"temperature is 1e-320; expected 1e-06 to 1e\+06"),
        ({"temperature": 1e7}, r"temperature is 10000000\.0"),
        ({"top_k": 1 << 25}, "top-k is 33554432; expected 0"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, r"top-p is 0\.0"),
        ({"top_p": 1.5}, r"top-p is 1\.5"),
        ({"min_p": -0.1}, r"min-p is -0\.1"),
        ({"min_p": math.nan}, "min-p is nan"),
        ({"sampler": "other"}, "sampler is 'other'; expected gumbel or rsd"),
    ],
)
def test_impossible_sampling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


# Sampled decoding: the pieces.


def slow_distribution(logits: list[float], sampling: Sampling) -> list[float]:
    scaled = [x / sampling.temperature for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    order = order[: sampling.top_k or None]
    weights = [math.exp(scaled[i] - scaled[order[0]]) for i in order]
    total, kept = sum(weights), []
    for weight in weights:
        kept.append(weight)
        if sum(kept) >= sampling.top_p * total:
            break
    kept = [weight for weight in kept if weight >= sampling.min_p * kept[0]]
    p = [0.0] * len(logits)
    for i, weight in zip(order, kept, strict=False):
        p[i] = weight / sum(kept)
    return p


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *((0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.7, 0.0), (5, 0.6, 0.0), (99, 0.01, 0.0)),
        *((0, 1.0, 0.1), (0, 1.0, 1.0), (4, 0.9, 0.3)),
    ],
)
def test_distribution_against_a_slow_one(temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = torch.randn(20, 12, generator=generator()) * 2
    logits[10:] = logits[10:].round()  # ties
    logits[3, 4], logits[3, 5] = -math.inf, math.nan
    p = distribution(logits, sampling)
    logits[3, 5] = -math.inf
    expected = torch.tensor(
        [slow_distribution(row, sampling) for row in logits.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-15)


def test_logits_without_a_finite_maximum_cannot_be_sampled():
    for bad in (math.nan, -math.inf, math.inf):
        with pytest.raises(ValueError, match="largest logit is not finite"):
            distribution(torch.tensor([[0.0, 1.0], [bad, bad]]), Sampling())
    with pytest.raises(ValueError, match="needs a generator"):
        next(generate(None, [1], None, max_tokens=1, sampling=Sampling()))


def p_value(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's chi-square test, rows [N, V] of counts against probabilities, all rows together.

    The rarest tokens of a row are taken together until 5 of them are expected.
    """
    statistic, freedom = 0.0, 0
    for row, chances in zip(counts.tolist(), p.tolist(), strict=True):
        assert all(chance > 0 or not n for n, chance in zip(row, chances, strict=True))
        rare, cells = (0.0, 0.0), []
        for chance, n in sorted(zip(chances, row, strict=True)):
            rare = rare[0] + chance * sum(row), rare[1] + n
            if rare[0] >= 5:
                cells.append(rare)
                rare = (0.0, 0.0)
        statistic += sum((n - expected) ** 2 / expected for expected, n in cells)
        freedom += len(cells) - 1
    assert freedom > 0, "too few draws for the test"
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


LEAST_P_VALUE = 1e-5


def sequences(q: list[float], count: int) -> dict[tuple[int, ...], float]:
    """Probabilities of drawing `count` tokens without replacement, in order."""
    result = {}
    support = [i for i, value in enumerate(q) if value > 0]
    for drawn in itertools.permutations(support, count):
        probability, left = 1.0, 1.0
        for token in drawn:
            probability *= q[token] / left
            left -= q[token]
        result[drawn] = probability
    return result


def test_draws_without_replacement_have_the_right_order():
    q = [0.45, 0.0, 0.3, 0.2, 0.05]
    drawn = sample(torch.tensor([q] * 120_000, dtype=torch.float64), 3, generator())
    expected = sequences(q, 3)
    assert len(expected) == 24 and math.isclose(sum(expected.values()), 1)
    index = {key: i for i, key in enumerate(expected)}
    counts = torch.zeros(1, len(index), dtype=torch.float64)
    for key in map(tuple, drawn.tolist()):
        counts[0, index[key]] += 1
    assert p_value(counts, torch.tensor([list(expected.values())])) > LEAST_P_VALUE


TOYS = {
    "opposite": ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]),
    "equal": ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
    "similar": ([0.5, 0.25, 0.15, 0.1], [0.45, 0.35, 0.1, 0.1]),
    "one certain": ([0.0, 1.0, 0.0, 0.0], [0.6, 0.1, 0.2, 0.1]),
    "draft misses some": ([0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.5, 0.0]),
    "target misses some": ([0.0, 0.7, 0.3, 0.0], [0.3, 0.2, 0.1, 0.4]),
    "nothing in common": ([0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.3, 0.7]),
}


def check_enumeration(rejection, p: list[float], q: list[float], count: int) -> None:
    """Add up the outcome over all choices, exactly: it must be p."""
    cases = sequences(q, count)
    accept_, residual = rejection(
        torch.tensor([p] * len(cases), dtype=torch.float64),
        torch.tensor([q] * len(cases), dtype=torch.float64),
        torch.tensor(list(cases), dtype=torch.int64).reshape(len(cases), count),
    )
    outcome = [0.0] * len(p)
    for (drawn, probability), chances, rest in zip(
        cases.items(), accept_.tolist(), residual.tolist(), strict=True
    ):
        for token, chance in zip(drawn, chances, strict=True):
            outcome[token] += probability * chance
            probability *= 1 - chance
        for token, share in enumerate(rest):
            outcome[token] += probability * share
    assert outcome == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("toy", TOYS)
def test_recursive_rejection_is_exact(toy, count):
    p, q = TOYS[toy]
    if count <= sum(value > 0 for value in q):
        check_enumeration(recursive_rejection, p, q, count)


def accept_as_if_first(p, q, choices):
    """Every choice as if it were the only one."""
    return (p / q).gather(1, choices).clamp(max=1), recursive_rejection(p, q, choices)[1]


def draw_from_target(p, q, choices):
    """After refusals the target itself, not what they leave of it."""
    return recursive_rejection(p, q, choices)[0], p


def draft_with_replacement(p, q, choices):
    """Later choices as if drawn from all tokens."""
    chances = []
    for x in choices.split(1, dim=1):
        chances.append((p.gather(1, x) / q.gather(1, x)).clamp(max=1))
        p = (p - q).clamp(min=0)
        p = p / p.sum(dim=1, keepdim=True)
    return torch.cat(chances, dim=1), p


WRONG_REJECTIONS = [accept_as_if_first, draw_from_target, draft_with_replacement]


@pytest.mark.parametrize("wrong", WRONG_REJECTIONS, ids=lambda f: f.__name__)
def test_enumeration_notices_wrong_rejections(wrong):
    with pytest.raises(AssertionError):
        check_enumeration(wrong, *TOYS["opposite"], 2)


def draws(
    p: torch.Tensor, q: torch.Tensor, count: int, number: int, rejection=recursive_rejection
) -> torch.Tensor:
    """Outcomes int64 [number] of drawing choices, accepting and drawing from the rest."""
    source = generator()
    p, q = (x.expand(number, -1) for x in (p, q))
    choices = sample(q, count, source)
    chances, rest = rejection(p, q, choices)
    tries = torch.rand(number, count, generator=source, dtype=torch.float64) < chances
    last = sample(rest, 1, source)
    outcomes = torch.cat([choices, last], dim=1)
    tries = torch.cat([tries, torch.ones(number, 1, dtype=torch.bool)], dim=1)
    return outcomes.gather(1, tries.long().argmax(dim=1, keepdim=True))[:, 0]  # the first True


@pytest.mark.parametrize("count", [1, 2, 4])
def test_draws_have_the_targets_distribution(count):
    logits = torch.randn(2, 12, generator=generator(1)) * 1.5
    p, q = distribution(logits, Sampling(temperature=1.2, top_k=10)).split(1)
    counts = draws(p, q, count, 200_000).bincount(minlength=12).double()[None]
    assert p_value(counts, p) > LEAST_P_VALUE


@pytest.mark.parametrize("wrong", WRONG_REJECTIONS, ids=lambda f: f.__name__)
def test_chi_square_notices_wrong_rejections(wrong):
    p, q = (torch.tensor([x], dtype=torch.float64) for x in TOYS["opposite"])
    counts = draws(p, q, 2, 100_000).bincount(minlength=4).double()[None]
    assert p_value(counts, p) > LEAST_P_VALUE
    counts = draws(p, q, 2, 100_000, wrong).bincount(minlength=4).double()[None]
    assert p_value(counts, p) < LEAST_P_VALUE


def test_choose_draws_from_the_target():
    """`choose` itself, token by token, with the choices that `propose` gives it."""
    sampling, source = Sampling(temperature=0.8), generator()
    target, other = torch.randn(2, 5, generator=generator(2))
    counts, accepted = torch.zeros(1, 5, dtype=torch.float64), [0, 0, 0]
    for _ in range(4000):
        choices, q = speculation.propose(other, 2, sampling, source)
        token, match = choose(target, choices, q, sampling, source)
        assert match is None or choices[match] == token
        counts[0, token] += 1
        accepted[2 if match is None else match] += 1
    assert min(accepted) > 100
    assert p_value(counts, distribution(target[None], sampling)) > LEAST_P_VALUE


# Sampled decoding: the whole loop.

WORDS = 6


@pytest.fixture
def markov(monkeypatch) -> SimpleNamespace:
    """A stand-in for model and forward pass: logits depend on the last token only."""
    source = generator(3)
    target = torch.randn(WORDS, WORDS, generator=source)
    guess = target + 0.7 * torch.randn(WORDS, WORDS, generator=source)

    def markov_forward(model, tokens, cache, *, draft=None, logit_rows=slice(None), **_):
        cache.length += len(tokens)
        return (target if draft is None else guess)[torch.tensor(tokens)][logit_rows]

    monkeypatch.setattr(speculation, "forward", markov_forward)
    config = small_config(blocks=1, heads=1, kv_heads=1, head_dim=2, context=1 << 20)
    return SimpleNamespace(model=SimpleNamespace(config=config), target=target)


def transitions(markov: SimpleNamespace, settings: Settings, sampling: Sampling, number: int):
    """Counts [WORDS, WORDS] of which token followed which in sampled text, and statistics."""
    counts, statistics = torch.zeros(WORDS, WORDS, dtype=torch.float64), Statistics()
    source = generator()
    for _ in range(number // 500):
        text = [0]
        steps = generate(
            markov.model,
            text.copy(),
            {},
            max_tokens=500,
            settings=settings,
            sampling=sampling,
            generator=source,
        )
        for step in steps:
            statistics.add(step)
            text += step.tokens
        pairs = torch.tensor(text[:-1]) * WORDS + torch.tensor(text[1:])
        counts += pairs.bincount(minlength=WORDS * WORDS).reshape(WORDS, WORDS)
    return counts, statistics


#: A match of three tokens needs no draft pass; a word follows any with some probability.
GUESSED = Policy(guess_costs=(60, 40, 30, 20), guess_limit=35)
SAMPLED = {
    "guesses": (
        Settings(rows=8, draft_length=2, choices=3, policy=GUESSED),
        Sampling(0.5, sampler="rsd"),
    ),
    "chain": (Settings(rows=4, choices=1), Sampling(sampler="rsd")),
    "alternates": (
        Settings(rows=8, draft_length=3, threshold=0.5, choices=3),
        Sampling(0.9, sampler="rsd"),
    ),
    "truncated": (
        Settings(rows=6, threshold=1.0),
        Sampling(1.5, top_k=4, top_p=0.9, min_p=0.1, sampler="rsd"),
    ),
}


@pytest.mark.parametrize(("settings", "sampling"), SAMPLED.values(), ids=SAMPLED.keys())
def test_sampled_text_has_the_targets_distribution(markov, settings, sampling):
    counts, statistics = transitions(markov, settings, sampling, 9_000)
    assert counts.sum() == 9_000
    assert 0.2 < statistics.match_rate < 0.9
    assert (statistics.alternate_hits > 150) == (settings.choices > 1)
    assert (statistics.guess_hits > 150) == settings.policy.guesses
    assert (statistics.free_steps > 150) == settings.policy.guesses
    assert p_value(counts, distribution(markov.target, sampling)) > LEAST_P_VALUE


def fail_on_some(markov: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft passes of token 1 and verify passes with token 2 or 4 behind the root fail."""
    ordinary = speculation.forward

    def failing(model, tokens, cache, *, draft=None, **options):
        if (draft is not None and tokens == [1]) or {2, 4} & set(tokens[1:]):
            raise NonFiniteError("draft" if draft is not None else "verify", "head", 0)
        markov.rows = len(tokens)
        return ordinary(model, tokens, cache, draft=draft, **options)

    monkeypatch.setattr(speculation, "forward", failing)


@pytest.mark.parametrize("case", ["chain", "alternates", "guesses"])
def test_repetitions_keep_the_targets_distribution(markov, monkeypatch, case):
    fail_on_some(markov, monkeypatch)
    settings, sampling = SAMPLED[case]
    counts, statistics = transitions(markov, settings, sampling, 6_000)
    assert statistics.repeated > 400
    assert p_value(counts, distribution(markov.target, sampling)) > LEAST_P_VALUE


def test_chi_square_notices_a_forgotten_proposal(markov, monkeypatch):
    """As if nothing had been proposed where a verify pass failed."""
    fail_on_some(markov, monkeypatch)
    settings, sampling = SAMPLED["chain"]

    def forgetting(logits, choices, q, *rest):
        known = ([], None) if markov.rows == 1 else (choices, q)
        return choose(logits, *known, *rest)

    monkeypatch.setattr(speculation, "choose", forgetting)
    counts, _ = transitions(markov, settings, sampling, 6_000)
    assert p_value(counts, distribution(markov.target, sampling)) < LEAST_P_VALUE


def test_sampled_text_depends_on_the_seed_only(subject):
    def text(seed: int, layers) -> list[int]:
        steps = generate(
            subject.model,
            subject.prompts[1],
            layers,
            max_tokens=30,
            settings=Settings(threshold=0.4),
            sampling=Sampling(0.8, top_k=20, sampler="rsd"),
            generator=torch.Generator().manual_seed(seed),
        )
        return [token for step in steps for token in step.tokens]

    torch.manual_seed(1)
    first = text(5, subject.layers)
    torch.manual_seed(2)
    assert text(5, subject.layers) == first
    assert text(6, subject.layers) != first
    assert len(text(5, None)) == len(first) == 30


def walk_with_one_too_many(proposal, logits, sampling, source):
    tokens, rows = accept(proposal, logits, sampling, source)
    position = len(rows) - 1
    if rows[-1] == position < len(proposal.chain):
        tokens, rows = [*tokens[:-1], proposal.chain[position]], rows
    return tokens, rows


def test_chi_square_notices_a_wrong_walk(markov, monkeypatch):
    settings, sampling = SAMPLED["alternates"]
    monkeypatch.setattr(speculation, "accept", walk_with_one_too_many)
    counts, _ = transitions(markov, settings, sampling, 5000)
    assert p_value(counts, distribution(markov.target, sampling)) < LEAST_P_VALUE


# Sampled decoding with noise that draft and target share.

NOISE = {
    "hot": Sampling(1.5),
    "cold": Sampling(0.3),
    "truncated": Sampling(0.9, top_k=20, top_p=0.9, min_p=0.05),
}


def sampled_steps(subject, layers, settings, sampling, seed: int) -> list[Step]:
    steps = generate(
        subject.model,
        subject.prompts[1],
        layers,
        max_tokens=TOKENS,
        settings=settings,
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
    )
    return list(steps)


@pytest.mark.parametrize("case", NOISE)
def test_sampled_text_is_the_same_with_and_without_speculation(subject, talkative, case):
    """Tokens and logit bits, over rows, draft lengths, choices, guesses and seeds."""
    total, texts = Statistics(), set()
    # Each case has a third of the settings, and all have guesses.
    third = list(SETTINGS.items())[list(NOISE).index(case) :: len(NOISE)]
    for model, several in ((subject, third), (talkative, GUESSES.items())):
        for seed, (name, settings) in enumerate(several):
            plain = sampled_steps(model, None, settings, NOISE[case], seed)
            steps = sampled_steps(model, model.layers, settings, NOISE[case], seed)
            for step in steps:
                total.add(step)
            tokens = [[t for s in made for t in s.tokens] for made in (plain, steps)]
            assert tokens[0] == tokens[1], f"SPEQ_SEED={SEED}: {name}"
            logits = [torch.cat([s.logits for s in made]) for made in (plain, steps)]
            assert torch.equal(*map(bits, logits)), f"SPEQ_SEED={SEED}: {name}"
            texts.add(tuple(tokens[0]))
    assert len(texts) > 5
    # Draft and target share their noise, so that a good draft is right although it is sampled.
    assert total.match_rate > 0.2 and total.guess_hits


def test_a_cutoff_is_one_addition():
    """Logits that are as far below the largest as T ln(min_p) says, in FP32, are the last ones."""
    sampling = Sampling(0.7, min_p=0.05)
    offset = np.float32(0.7 * math.log(0.05))
    assert np.float32(sampling.cutoff) == offset and Sampling().cutoff == -math.inf
    for value in (3.1, -20.0, 1e4, 1e-3):
        largest = np.float32(value)
        least = largest + offset
        row = [np.nextafter(least, np.float32(-np.inf)), least, largest, np.float32(-np.inf)]
        logits = torch.tensor(np.float32(row))[None]
        scores = speculation.perturbed(logits, [5], sampling, 3)[0]
        assert (scores > -math.inf).tolist() == [False, True, True, False]
        assert (distribution(logits, sampling)[0] > 0).tolist() == [False, True, True, False]
        # The others' scores are as ever.
        plain = speculation.perturbed(logits, [5], replace(sampling, min_p=0.0), 3)[0]
        assert torch.equal(scores[1:3], plain[1:3])


def test_noise_of_another_position_spoils_drafts(monkeypatch):
    """As if draft and verify passes counted positions differently: right text, fewer matches."""
    subject, settings, rates = random_subject("llama"), Settings(choices=1), []
    for shift in (0, 1):

        def shifted(logits, positions, sampling, seed, shift=shift):
            away = shift if len(logits) == 1 and logits.isinf().any() else 0
            return plain_perturbed(logits, [p + away for p in positions], sampling, seed)

        monkeypatch.setattr(speculation, "perturbed", shifted)
        total = Statistics()
        # Re-ranked, so that draft passes can be told by their infinities.
        for seed in range(2):
            for step in sampled_steps(
                subject, subject.layers, replace(settings, reranked=8), Sampling(1.5), seed
            ):
                total.add(step)
        rates.append(total.match_rate)
    assert rates[0] > 2 * rates[1], rates


plain_perturbed = speculation.perturbed


def test_shared_noise_has_the_targets_distribution(markov):
    """Over seeds, as text of one seed is one draw."""
    settings = Settings(rows=8, draft_length=3, threshold=0.5, choices=3, policy=GUESSED)
    sampling = Sampling(0.9, top_k=5)
    counts = torch.zeros(WORDS, WORDS, dtype=torch.float64)
    for seed in range(20):
        text = [0]
        for step in generate(
            markov.model,
            [0],
            {},
            max_tokens=100,
            settings=settings,
            sampling=sampling,
            generator=torch.Generator().manual_seed(1000 * SEED + seed),
        ):
            text += step.tokens
        pairs = torch.tensor(text[:-1]) * WORDS + torch.tensor(text[1:])
        counts += pairs.bincount(minlength=WORDS * WORDS).reshape(WORDS, WORDS)
    assert counts.sum() == 2000
    assert p_value(counts, distribution(markov.target, sampling)) > LEAST_P_VALUE
