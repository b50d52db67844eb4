# SPDX-License-Identifier: Apache-2.0
"""What passes move, and cycles of a product, against counts worked by hand, encoded tensors and the
engine."""

from __future__ import annotations

import pytest
import torch

from speq.hw import EngineConfig
from speq.hw.array.gemm_engine import GemmEngine
from speq.model.checkpoint import ModelConfig
from speq.model.cycles import (
    Engine,
    draft_pass,
    gemm_cycles,
    gemm_latency,
    kv_bytes,
    linear_shapes,
    plain_pass,
    uniform_formats,
    verify_pass,
)
from speq.model.evaluation import counted_costs
from speq.model.format import encode
from speq.model.number_format import FormatConfig, draft_words, residual_words
from tests.model.drafted import pass_costs
from tests.model.small_models import small_config

ENGINE = Engine(rows=8, cols=16)
LLAMA_3_1_8B = ModelConfig(
    *("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072),
    norm_eps=1e-5,
    rope_base=500_000.0,
    attention_scale=128**-0.5,
    tied_head=False,
)
LLAMA_2_13B = ModelConfig(
    *("llama", 32_000, 5120, 13_824, 40, 40, 40, 128, 4096),
    norm_eps=1e-5,
    rope_base=10_000.0,
    attention_scale=128**-0.5,
    tied_head=False,
)


def test_constants_are_the_engines():
    config = EngineConfig(rows=ENGINE.rows, cols=ENGINE.cols)
    engine = GemmEngine(config)
    assert (ENGINE.fill, ENGINE.overhead) == (engine.FILL, engine.OVERHEAD)


@pytest.mark.parametrize(
    ("steps", "outputs", "tokens", "cycles"),
    [
        (100, 100, 8, 7 * 100),  # 7 tiles of 16
        (145, 33, 1, 3 * 145),  # K = 578 in draft mode
        (5, 50, 8, 4 * 8),  # fewer words than tokens
        (150, 17, 20, 2 * (2 * 150 + 150)),  # two full batches of rows and one of 4
        (6, 16, 10, 8 + 6),  # a full batch is held up by its 8 results, one of 2 is not
        (3, 16, 16, 2 * 8),
        (3, 40, 5, 3 * 5),
    ],
)
def test_gemm_cycles_by_hand(steps, outputs, tokens, cycles):
    assert gemm_cycles(steps, outputs, tokens, ENGINE) == cycles


def test_gemm_latency_by_hand():
    # Command, 2 cycles, 700 words, and the last of 8 results 14 + 7 cycles after the last word.
    assert gemm_latency(100, 100, 8, ENGINE) == 2 + 699 + 14 + 7
    # 4 tiles of 5 words, of which three wait 3 cycles each.
    assert gemm_latency(5, 50, 8, ENGINE) == 2 + (4 * 5 + 3 * 3 - 1) + 14 + 7
    with pytest.raises(ValueError, match="9 tokens do not fit into 8 rows"):
        gemm_latency(5, 50, 9, ENGINE)


def test_words_of_planes():
    assert [draft_words(k) for k in (1, 4, 5, 576)] == [1, 1, 2, 144]
    assert [residual_words(k) for k in (1, 4, 5, 576)] == [3, 3, 6, 432]


def test_linear_shapes_include_a_tied_head():
    config = small_config(tied_head=True)
    shapes = linear_shapes(config)
    assert list(shapes)[-1] == "head" and shapes["head"] == (config.vocab_size, config.hidden)
    assert len(shapes) == 7 * config.blocks + 1


def test_plain_pass_by_hand():
    """hidden 64, FFN 96, 4 heads and 2 KV heads of 16, 2 blocks, vocabulary 264."""
    config = small_config()
    cost = plain_pass(config, ENGINE, context=9)
    assert config.vocab_size == 264
    weights = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64) + 264 * 64
    assert (cost.weights, cost.groups) == (2 * weights, 0)
    # 9 positions read and one written; per block 2 heads x 16 numbers, a key and a value of each.
    assert cost.kv == 10 * 2 * (2 * 16 * 2 * 2)
    assert cost.bytes == cost.weights + cost.kv


def test_draft_and_verify_pass_by_hand():
    config = small_config()
    formats = uniform_formats(config, FormatConfig())
    draft = draft_pass(config, ENGINE, formats, context=9)
    in_blocks = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64
    # The head's 264 rows are padded to 17 tiles of 16; 64 weights of 4 bits are 16 words.
    assert draft.weights == 2 * in_blocks // 2 + 2 * 16 * 272
    # K of 96 takes two group bytes, everything else one; 64 + 32 + 32 + 64 + 96 + 96 rows of it.
    per_block = 384 + 2 * 64
    assert draft.groups == 2 * per_block + 272
    assert draft.kv == kv_bytes(config, 9, 1) == plain_pass(config, ENGINE, 9).kv

    verify = verify_pass(config, ENGINE, formats, 8, context=9)
    assert verify.weights == 2 * (2 * in_blocks + 272 * 64)
    assert verify.groups == draft.groups
    assert verify.kv == (9 + 8) * 2 * (2 * 16 * 2 * 2)


def test_only_the_first_rows_of_the_head_are_drafted():
    config = small_config()
    formats = uniform_formats(config, FormatConfig())
    whole = draft_pass(config, ENGINE, formats)
    some = draft_pass(config, ENGINE, formats, drafted_outputs=100)
    assert whole.weights - some.weights == 32 * (272 - 112)
    assert whole.groups - some.groups == 272 - 112
    for impossible in (0, config.vocab_size + 1):
        with pytest.raises(
            ValueError, match=f"drafted outputs are {impossible}; expected 1 to 264"
        ):
            draft_pass(config, ENGINE, formats, drafted_outputs=impossible)


def test_exact_logits_of_a_draft_pass_by_hand():
    config = small_config()
    formats = uniform_formats(config, FormatConfig())
    whole = draft_pass(config, ENGINE, formats)
    some = draft_pass(config, ENGINE, formats, reranked_tiles=3)
    assert some.weights - whole.weights == 3 * 16 * 64 * 2
    assert some.groups - whole.groups == 3 * 16
    del formats["head"]
    assert draft_pass(config, ENGINE, formats, reranked_tiles=3) == draft_pass(
        config, ENGINE, formats
    )


def test_layers_without_a_format_are_read_whole():
    config = small_config()
    formats = uniform_formats(config, FormatConfig())
    del formats["head"]
    draft = draft_pass(config, ENGINE, formats)
    whole = draft_pass(config, ENGINE, uniform_formats(config, FormatConfig()))
    assert draft.weights - whole.weights == 2 * 264 * 64 - 32 * 272
    assert draft.groups == whole.groups - 272
    nothing, plain = draft_pass(config, ENGINE, {}, context=5), plain_pass(config, ENGINE, 5)
    assert nothing.bytes == plain.bytes


def test_bytes_are_those_of_encoded_tensors():
    config = small_config(vocab_size=250, ffn_hidden=100, tied_head=False)
    formats = uniform_formats(config, FormatConfig()) | {"head": FormatConfig(32, 1)}
    encoded = {
        name: encode(torch.ones(shape, dtype=torch.float16), formats[name], name=name)
        for name, shape in linear_shapes(config).items()
    }
    assert counted_costs(config, formats).relative == pass_costs(encoded)


def test_sliding_windows_read_only_their_positions():
    config = small_config("gemma3")  # blocks 0 and 1 see 6 positions, their own included
    entry = 2 * 2 * config.kv_heads * config.head_dim
    assert kv_bytes(config, 3, 1) == entry * 3 * 4
    assert kv_bytes(config, 20, 2) == entry * (7 + 7 + 22)


@pytest.mark.parametrize(
    ("config", "parameters"), [(LLAMA_3_1_8B, 8_030_261_248), (LLAMA_2_13B, 13_015_864_320)]
)
def test_published_models(config, parameters):
    """Their published numbers of parameters, of which a pass reads all but the embedding and the
    norms; a 4-bit draft of a large model costs a quarter of a pass and the group bytes."""
    unread = config.vocab_size * config.hidden + (2 * config.blocks + 1) * config.hidden
    assert plain_pass(config, ENGINE).weights == 2 * (parameters - unread)
    costs = counted_costs(config, uniform_formats(config, FormatConfig()))
    draft, verify = costs.relative
    assert draft == pytest.approx(0.25 + 1 / 128)  # one group byte for 128 bytes of weights
    assert verify == pytest.approx(1 + 1 / 128)


@pytest.mark.parametrize("rows, cols", [(0, 16), (8, 0)])
def test_impossible_arrays(rows, cols):
    with pytest.raises(ValueError, match="is 0; expected at least 1"):
        Engine(rows, cols)
