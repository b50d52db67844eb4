# SPDX-License-Identifier: Apache-2.0
"""The exact forward pass: against a float64 reference, and its independence of the batch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch

from speq.model.arith import draft_gemm, quantize_activations, verify_gemm
from speq.model.checkpoint import ARCHITECTURES, LINEARS, CheckpointError, Model, linear_names
from speq.model.format import encode
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.schedule import pass_schedule
from speq.model.transformer import (
    AttentionRequest,
    KVCache,
    LinearRequest,
    NonFiniteError,
    StoreRequest,
    attention_steps,
    finish,
    forward,
    linear_inputs,
    pass_steps,
    prefill,
    prepare_draft_linears,
    rotary_tables,
)
from tests.model.small_models import (
    BEHIND_PREFILL,
    OVERFLOWS,
    overflowing,
    perplexity,
    random_tokens,
    random_weights,
    reference_logits,
    small_config,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
TEXT = """The lighthouse keeper counted the steps every morning, one hundred and twelve of them, \
although nobody had asked him to. In winter the wind came through the cracks in the glass, and he \
wrote the temperature into a small green book. "Someone will want to know," he told the cat.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

If a train leaves at 9:40 and travels 150 kilometres at 60 kilometres per hour, it needs two and a \
half hours, so it arrives at 12:10. A ship needs three times as long for the same distance.
"""


def small_model(architecture: str = "llama", **changes) -> Model:
    config = small_config(architecture, **changes)
    weights = {name: w.to(torch.float16) for name, w in random_weights(config, SEED).items()}
    return Model(f"random {architecture}", config, weights, tokenizer=None)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def encoded_linears(model: Model, config: FormatConfig) -> dict:
    names = linear_names(model.config)
    return {name: encode(model.linear_weight(name), config, name=name) for name in names}


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    different = bits(got) != bits(expected)
    assert not different.any(), f"SPEQ_SEED={SEED}: {int(different.sum())} logits differ in bits"


@pytest.fixture(scope="module")
def smollm2() -> Model:
    try:
        return load_model("smollm2")
    except CheckpointError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_float64_reference(architecture):
    """Errors are those of FP16 roundings at the array's inputs, and leave perplexity alone, as far
    as 40 random tokens can tell."""
    model = small_model(architecture)
    tokens = random_tokens(model.config, 40, SEED)
    logits = forward(model, tokens, KVCache(model.config, 40))
    expected = reference_logits(model.config, model.weights, tokens)
    error = (logits - expected).abs().max() / expected.std()
    print(f"SPEQ_SEED={SEED} {architecture}: largest error {error:.5f} of the logits' deviation")
    assert error < 0.02
    ratio = perplexity(logits, tokens) / perplexity(expected, tokens)
    assert abs(ratio - 1) < 3e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_divisors": tuple(1.0 + i for i in range(8))},
        {"kv_heads": 1},
        {"kv_heads": 4, "tied_head": False},
        {"hidden": 44, "ffn_hidden": 172, "head_dim": 6},
    ],
    ids=["scaled RoPE", "one KV head", "no sharing, own head", "odd sizes"],
)
def test_llama_variants_agree_with_reference(changes):
    model = small_model("llama", **changes)
    tokens = random_tokens(model.config, 24, SEED)
    logits = forward(model, tokens, KVCache(model.config, 24))
    expected = reference_logits(model.config, model.weights, tokens)
    assert (logits - expected).abs().max() < 0.02 * expected.std()


@pytest.mark.parametrize("draft", [False, True], ids=["verify", "draft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logit_bits_do_not_depend_on_the_batch(architecture, draft):
    model = small_model(architecture)
    tokens = random_tokens(model.config, 24, SEED)
    layers = prepare_draft_linears(encoded_linears(model, FormatConfig())) if draft else None
    together = forward(model, tokens, KVCache(model.config, 24), draft=layers)
    for sizes in ([1] * 24, [8, 8, 8], [3, 1, 7, 13]):
        cache = KVCache(model.config, 24)
        parts = [
            forward(model, tokens[cache.length : cache.length + size], cache, draft=layers)
            for size in sizes
        ]
        assert_same_bits(torch.cat(parts), together)


def verify_pass(model: Model, cache: KVCache, chain: list[int], alternates: dict[int, int]):
    """One pass over a chain and alternates {index of the chain token it replaces: token}."""
    start, length = cache.length, len(chain)
    rows = length + len(alternates)
    mask = torch.zeros(rows, start + rows, dtype=torch.bool)
    mask[:length] = torch.ones(length, start + rows, dtype=torch.bool).tril(start)
    positions = list(range(start, start + length))
    for row, index in enumerate(alternates, start=length):
        mask[row, : start + index] = True
        mask[row, start + row] = True
        positions.append(start + index)
    tokens = [*chain, *alternates.values()]
    return forward(model, tokens, cache, positions=positions, mask=mask)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_leaf_alternates_give_the_bits_of_plain_decoding(architecture):
    """Rows of the chain and of the alternates, and what follows after compaction."""
    model = small_model(architecture)
    tokens = random_tokens(model.config, 20, SEED)
    prompt, chain, others, following = tokens[:10], tokens[10:14], tokens[14:17], tokens[17:]
    alternates = {1: others[0], 3: others[1], 0: others[2]}
    cache = KVCache(model.config, 32)
    forward(model, prompt, cache)
    verified = verify_pass(model, cache, chain, alternates)
    for row, index in enumerate(alternates, start=len(chain)):
        path = [*prompt, *chain[:index], alternates[index]]
        plain = forward(model, path, KVCache(model.config, 32))
        assert_same_bits(verified[row], plain[-1])
    plain_cache = KVCache(model.config, 32)
    plain = forward(model, [*prompt, *chain], plain_cache)
    assert_same_bits(verified[: len(chain)], plain[len(prompt) :])
    # Commit chain[:3] and the alternate of index 3, then decode on.
    cache.keep(10, [10, 11, 12, 15])
    assert cache.length == 14
    assert cache.positions[:14].tolist() == list(range(14))
    plain_cache.truncate(13)
    forward(model, [others[1]], plain_cache)
    assert_same_bits(forward(model, following, cache), forward(model, following, plain_cache))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_cache_slots_may_lie_in_any_order(architecture):
    model = small_model(architecture)
    tokens = random_tokens(model.config, 12, SEED)
    cache, moved = KVCache(model.config, 16), KVCache(model.config, 16)
    for c in (cache, moved):
        forward(model, tokens[:11], c)
    moved.keep(2, [7, 2, 10, 4, 3, 9, 8, 5, 6])
    last = tokens[11:]
    assert_same_bits(
        forward(model, last, moved, positions=[11]), forward(model, last, cache, positions=[11])
    )


def test_a_pass_asks_for_its_products_stage_by_stage():
    """What depends on nothing but one input comes together; attention's two products follow."""
    model = small_model("qwen2")
    c = model.config
    tables = rotary_tables(model, torch.arange(2))
    q, k, v, o, gate, up, down = LINEARS
    expected = []
    for i in range(c.blocks):
        for part in ((q, k, v), ("store",), ("attend",), (o,), (gate, up), (down,)):
            expected.append(tuple(f"block.{i}.{name}" for name in part))

    def requests(schedule: list) -> tuple[list[tuple[str, ...]], torch.Tensor | None]:
        steps = pass_steps(model, schedule, torch.tensor([3, 1]), tables)
        seen = []
        answer = None
        with pytest.raises(StopIteration) as end:
            while True:
                match steps.send(answer):
                    case LinearRequest(names, x):
                        seen.append(names)
                        answer = [verify_gemm(x, model.operands[name]) for name in names]
                    case StoreRequest(block, keys, values):
                        seen.append((f"block.{block}.store",))
                        assert keys.shape == values.shape == (2, c.kv_heads, c.head_dim)
                        answer = None
                    case AttentionRequest(block, queries):
                        seen.append((f"block.{block}.attend",))
                        assert queries.shape == (2, c.heads, c.head_dim)
                        answer = torch.zeros(2, c.heads * c.head_dim, dtype=torch.float16)
        return seen, end.value.value

    seen, logits = requests(pass_schedule(c))
    assert seen == [*expected, ("head",)]
    assert logits.shape == (2, c.vocab_size)
    # A prefill pass ends with the last block's keys and values.
    assert requests(pass_schedule(c, prefill=True)) == (expected[:-4], None)
    attention_pass = attention_steps(torch.zeros(1, 2).half(), torch.ones(1, 1).bool(), 1.0)
    next(attention_pass)
    with pytest.raises(RuntimeError, match="more steps"):
        finish(attention_pass, torch.zeros(1, 1))


def test_draft_pass_uses_draft_numerics_where_it_has_draft_weights():
    model = small_model()
    config = FormatConfig()
    encoded = encoded_linears(model, config)
    tokens = random_tokens(model.config, 6, SEED)
    exact = forward(model, tokens, KVCache(model.config, 6))
    layers = prepare_draft_linears(encoded)
    inputs = {}
    logits = forward(
        model, tokens, KVCache(model.config, 6), draft=layers, capture=inputs.__setitem__
    )
    assert list(inputs) == linear_names(model.config)
    assert not torch.equal(logits, exact)
    quantized = quantize_activations(inputs["head"], config.group)
    assert_same_bits(logits, draft_gemm(quantized, encoded["head"]))
    without_head = {name: layer for name, layer in layers.items() if name != "head"}
    logits = forward(
        model, tokens, KVCache(model.config, 6), draft=without_head, capture=inputs.__setitem__
    )
    assert_same_bits(logits, verify_gemm(inputs["head"], model.linear_weight("head")))
    assert_same_bits(forward(model, tokens, KVCache(model.config, 6), draft={}), exact)


def test_linear_inputs_are_those_of_the_pass():
    model = small_model()
    tokens = random_tokens(model.config, 8, SEED)
    captured = {}
    forward(model, tokens, KVCache(model.config, 8), capture=captured.__setitem__)
    inputs = linear_inputs(model, tokens, block=1)
    assert tuple(inputs) == LINEARS
    for name, x in inputs.items():
        assert x.dtype == torch.float16
        assert x.shape == (8, model.weights[f"block.1.{name}"].shape[1])
        assert torch.equal(x, captured[f"block.1.{name}"])
    with pytest.raises(ValueError, match=r"block 2 is not within 0\.\.1"):
        linear_inputs(model, tokens, block=2)


def test_logit_rows_selects_rows():
    model = small_model()
    tokens = random_tokens(model.config, 8, SEED)
    every = forward(model, tokens, KVCache(model.config, 8))
    last = forward(model, tokens, KVCache(model.config, 8), logit_rows=slice(-2, None))
    assert_same_bits(last, every[-2:])


# Results that are not finite.

OVERFLOWING = [f"block.{block}.{layer}" for block in (0, 1) for layer in OVERFLOWS] + ["head"]


@pytest.mark.parametrize("layer", OVERFLOWING)
def test_a_result_that_is_not_finite_ends_a_pass(layer):
    """In passes of any kind: the first product is named, and the position of the token's row."""
    token, text = 7, [3, 5, 9, 7, 4, 7]
    model = overflowing(small_model(), token, layer)
    layers = prepare_draft_linears(encoded_linears(model, FormatConfig()))
    expected = layer.split(" ")[0]

    def ended(kind: str, run: Callable[..., object], position: int, *arguments, **options):
        with pytest.raises(NonFiniteError) as error:
            run(model, *arguments, **options)
        got = (error.value.kind, error.value.layer, error.value.position, error.value.step)
        assert got == (kind, expected, position, None)
        assert re.fullmatch(
            f"NONFINITE: a result of {expected} is not finite at position {position}, in the {kind}"
            " pass: .*",
            str(error.value),
        )

    for kind, draft in (("verify", None), ("draft", layers)):
        cache = KVCache(model.config, 12)
        before = forward(model, text[:2], cache, draft=draft)
        assert torch.isfinite(before).all()
        slots = cache.length
        ended(kind, forward, 3, text[2:], cache, draft=draft)
        positions, mask = [2, 9], torch.ones(2, 4, dtype=torch.bool)
        mask[1, 2] = mask[0, 3] = False
        ended(kind, forward, 9, [4, 7], cache, draft=draft, positions=positions, mask=mask)
        assert cache.length == slots
        # What the failed passes have left in the cache is nothing to those that follow.
        after = forward(model, text[2:3], cache, draft=draft)
        alone = forward(model, text[:3], KVCache(model.config, 3), draft=draft)
        assert_same_bits(after, alone[-1:])
    cache = KVCache(model.config, 12)
    if layer in BEHIND_PREFILL:
        prefill(model, text, cache)
    else:
        ended("prompt", prefill, 3, text, cache)
        assert cache.length == 0


def test_logit_rows_keep_their_positions():
    """The head's first row is not the pass's."""
    model = overflowing(small_model(), 7, "head")
    cache = KVCache(model.config, 8)
    with pytest.raises(NonFiniteError) as error:
        forward(model, [1, 7, 2, 7], cache, logit_rows=slice(2, None))
    assert (error.value.layer, error.value.position) == ("head", 3)
    forward(model, [1, 7, 2, 7], cache, logit_rows=slice(2, 3))


def test_prefill_fills_the_cache_as_a_pass_does():
    for architecture in ARCHITECTURES:
        model = small_model(architecture)
        tokens = random_tokens(model.config, 9, SEED)
        filled, expected = KVCache(model.config, 16), KVCache(model.config, 16)
        prefill(model, tokens, filled)
        forward(model, tokens, expected)
        assert filled.length == expected.length == 9
        for name in ("keys", "values", "positions"):
            assert torch.equal(getattr(filled, name), getattr(expected, name))


def test_prefill_names_the_lowest_position():
    """As decoding token by token does, even if a later token fails in an earlier product."""
    early, late = "block.0.values", "block.1.values"
    model = overflowing(overflowing(small_model(), 7, early), 5, late, axis=1)
    for text, layer, position in (
        ([1, 2, 7, 3, 5], early, 2),
        ([1, 5, 7, 3, 7], late, 1),
        ([1, 2, 3, 5, 7], late, 3),
        ([7, 5], early, 0),
    ):
        with pytest.raises(NonFiniteError) as error:
            prefill(model, text, KVCache(model.config, 5))
        assert (error.value.layer, error.value.position) == (layer, position)


def test_nonfinite_weights_show_in_every_row():
    for value in (torch.inf, torch.nan):
        model = small_model()
        model.weights["block.0.down_proj"][3, 5] = value
        with pytest.raises(NonFiniteError) as error:
            forward(model, random_tokens(model.config, 3, SEED), KVCache(model.config, 3))
        assert (error.value.layer, error.value.position) == ("block.0.down_proj", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, r"tokens must be one or more ids within 0\.\.263"),
        ({"tokens": [264]}, "tokens must be one or more ids"),
        ({"tokens": [-1]}, "tokens must be one or more ids"),
        ({"tokens": [1] * 9}, "do not fit into the KV cache"),
        ({"positions": [1]}, "positions must be 2 numbers"),
        ({"positions": [-1, 0]}, "positions must be 2 numbers"),
        ({"mask": torch.ones(2, 2)}, "mask must be bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask must be bool"),
        ({"mask": torch.zeros(2, 2, dtype=torch.bool)}, "attend to itself"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    model = small_model()
    cache = KVCache(model.config, 8)
    with pytest.raises(ValueError, match=message):
        forward(model, **({"tokens": [1, 2], "cache": cache} | arguments))
    assert cache.length == 0


def test_cache_refuses_slots_that_are_not_in_use():
    cache = KVCache(small_config(), 8)
    with pytest.raises(ValueError, match="cannot truncate 0 cache slots to 1"):
        cache.truncate(1)
    with pytest.raises(ValueError, match="not all within"):
        cache.keep(0, [0])


def test_smollm2_batch_invariance_and_answer(smollm2):
    """Greedy decoding one token at a time, then the same tokens in one pass: the same bits."""
    tokenizer = smollm2.tokenizer
    prompt = tokenizer.encode_chat("What is the capital of France?")
    cache = KVCache(smollm2.config, 64)
    rows = [forward(smollm2, prompt, cache, logit_rows=slice(-1, None))]
    reply = []
    while len(reply) < 8:
        reply.append(int(rows[-1].argmax()))
        if reply[-1] in tokenizer.stop_ids:
            break
        rows.append(forward(smollm2, reply[-1:], cache))
    assert tokenizer.decode(reply) == "The capital of France is Paris."
    cache.truncate(len(prompt))
    together = forward(smollm2, reply[:-1], cache)
    assert_same_bits(together, torch.cat(rows[1 : len(reply)]))


@pytest.mark.slow
def test_smollm2_perplexity_is_that_of_float32(smollm2):
    tokens = smollm2.tokenizer.encode(TEXT)
    logits = forward(smollm2, tokens, KVCache(smollm2.config, len(tokens)))
    expected = reference_logits(smollm2.config, smollm2.weights, tokens, torch.float32)
    ours, theirs = perplexity(logits, tokens), perplexity(expected, tokens)
    error = (logits - expected).abs().max()
    print(
        f"{len(tokens)} tokens: perplexity {ours:.4f}, float32 {theirs:.4f} "
        f"({100 * (ours / theirs - 1):+.4f} %), largest logit error {error:.4f} "
        f"(deviation of the logits {expected.std():.3f})"
    )
    assert abs(ours / theirs - 1) < 1e-3
