# SPDX-License-Identifier: Apache-2.0
"""GGUF files of every architecture and quantisation, written the way llama.cpp's converter does it.

Names of tensors, quantisation and dequantisation are those of the `gguf` package, and transformers
computes with the dequantised weights. Where transformers itself reads GGUF files of an
architecture, its reading of the metadata is a second witness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from speq.model.checkpoint import Model
from speq.model.loaders import load_model
from tests.model.reference_models import (
    FLOAT64_BOUND,
    TEXT,
    difference,
    seeded_tensor,
    seeded_tokens,
)
from tests.model.small_models import MERGES, byte_level_tokens, reference_logits
from tests.oracle.cases import GRANITE, LLAMA3, model, rope
from tests.oracle.hf_models import Float64, compare_logits, logits, named, read
from tests.oracle.table import Check, Row

KINDS = gguf.GGMLQuantizationType
WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
READ_ONLY = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "NVFP4"),
)
SUPER_BLOCK = 256  # weights of the largest block
# The file has divisors of RoPE in float32, which are 6e-8 off; angles are up to TEXT.
FLOAT32_DIVISORS = 1e-6
# Files have settings in float32, in which these and all others here are exact.
EPS = {"rms_norm_eps": 2.0**-17}

Metadata = Callable[[gguf.GGUFWriter, PreTrainedConfig], None]


@dataclass(frozen=True)
class GgufCase:
    """A small model as a GGUF file.

    `architecture` is GGUF's name; `metadata` adds what only this architecture or trait has;
    `pairs` says that rows of q and k are stored for rotary pairs (2i, 2i + 1), `again` that
    transformers reads such a file itself; matrices are written in each of `kinds`.
    """

    name: str
    architecture: str
    settings: dict[str, Any]
    metadata: Metadata = lambda writer, config: None
    pairs: bool = False
    again: bool = False
    bound: float = FLOAT64_BOUND
    kinds: tuple[str, ...] = ("F16",)


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    settings = config.rope_parameters
    settings = settings.get("full_attention", settings)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(settings["factor"])


def linear_rope_without_type(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def linear_rope_old(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_float32("llama.rope.scale_linear", config.rope_parameters["factor"])


def llama3_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """The divisors as a tensor, as the converter computes them."""
    s, size = config.rope_parameters, head_dim(config)
    trained = s["original_max_position_embeddings"]
    divisors = []
    for i in range(0, size, 2):
        length = 2 * math.pi * s["rope_theta"] ** (i / size)
        if length < trained / s["high_freq_factor"]:
            divisors.append(1.0)
        elif length > trained / s["low_freq_factor"]:
            divisors.append(s["factor"])
        else:
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            smooth = (trained / length - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / s["factor"] + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))


def dimension_count(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_rope_dimension_count(head_dim(config))


def window(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)


def phi3(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    dimension_count(writer, config)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_pad_token_id(0)  # transformers' default is beyond a small vocabulary


def multipliers(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    dimension_count(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def also(*parts: Metadata) -> Metadata:
    def add(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
        for part in parts:
            part(writer, config)

    return add


LLAMA = model("llama", **EPS)
QWEN2, QWEN3 = model("qwen2", **EPS), model("qwen3", head_dim=128, **EPS)
# GGUF files of Gemma 3 leave the pattern, the local base and, but for 27B, the scale to the reader.
GEMMA = model(
    "gemma3_text",
    head_dim=256,
    num_attention_heads=2,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    sliding_window=5,
    num_hidden_layers=7,
    **EPS,
)
GEMMA_LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GRANITE_EXACT = GRANITE | {"residual_multiplier": 0.25}

CASES = (
    GgufCase(
        "llama", "llama", LLAMA, dimension_count, pairs=True, again=True, kinds=WRITTEN + READ_ONLY
    ),
    GgufCase(
        "llama tied head",
        "llama",
        LLAMA | {"tie_word_embeddings": True},
        dimension_count,
        pairs=True,
        again=True,
    ),
    GgufCase("llama no dimension_count", "llama", LLAMA, pairs=True),
    GgufCase("llama head_dim", "llama", LLAMA | {"head_dim": 24}, dimension_count, pairs=True),
    GgufCase(
        "llama rope_theta",
        "llama",
        LLAMA | rope(500.0),
        dimension_count,
        pairs=True,
        again=True,
    ),
    GgufCase("llama MQA", "llama", LLAMA | {"num_key_value_heads": 1}, pairs=True),
    GgufCase("llama biases", "llama", LLAMA | {"attention_bias": True}, pairs=True),
    GgufCase(
        "llama linear RoPE",
        "llama",
        LLAMA | rope(kind="linear", factor=4.0),
        linear_rope,
        pairs=True,
    ),
    GgufCase(
        "llama linear RoPE, no type",
        "llama",
        LLAMA | rope(kind="linear", factor=4.0),
        linear_rope_without_type,
        pairs=True,
    ),
    GgufCase(
        "llama linear RoPE, scale_linear",
        "llama",
        LLAMA | rope(kind="linear", factor=4.0),
        linear_rope_old,
        pairs=True,
    ),
    GgufCase(
        "llama llama3 RoPE",
        "llama",
        LLAMA | rope(500.0, kind="llama3", **LLAMA3),
        also(dimension_count, llama3_rope),
        pairs=True,
        bound=FLOAT32_DIVISORS,
    ),
    GgufCase(
        "mistral",
        "llama",
        model("mistral", sliding_window=None, **EPS),
        dimension_count,
        pairs=True,
        again=True,
    ),
    GgufCase(
        "smollm3",
        "smollm3",
        model("smollm3", num_hidden_layers=5, **EPS),
        pairs=True,
        kinds=WRITTEN,
    ),
    GgufCase("phi3", "phi3", model("phi3", **EPS), phi3, again=True, kinds=WRITTEN),
    GgufCase("phi3 window", "phi3", model("phi3", sliding_window=5, **EPS), phi3),
    GgufCase("qwen2", "qwen2", QWEN2, again=True, kinds=WRITTEN),
    GgufCase("qwen2 tied head", "qwen2", QWEN2 | {"tie_word_embeddings": True}, again=True),
    GgufCase("qwen2 linear RoPE", "qwen2", QWEN2 | rope(kind="linear", factor=4.0), linear_rope),
    GgufCase("qwen3", "qwen3", QWEN3, again=True, kinds=WRITTEN),
    GgufCase("qwen3 head_dim", "qwen3", QWEN3 | {"head_dim": 16}),
    GgufCase("gemma3", "gemma3", GEMMA, window, again=True, kinds=WRITTEN),
    GgufCase(
        "gemma3 linear RoPE",
        "gemma3",
        GEMMA | {"head_dim": 16, "query_pre_attn_scalar": 16, "rope_parameters": GEMMA_LINEAR},
        also(window, linear_rope),
    ),
    GgufCase(
        "granite",
        "granite",
        model("granite", **EPS, **GRANITE_EXACT),
        multipliers,
        pairs=True,
        kinds=WRITTEN,
    ),
)


def add_metadata(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """What the files of all architectures have."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    writer.add_vocab_size(config.vocab_size)


def add_small_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The byte-level tokenizer of the small models."""
    tokens = byte_level_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(list(MERGES))
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_eos_token_id(2)


def paired(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows for rotary pairs (i, i + size / 2) -> pairs (2i, 2i + 1), as the converter stores q and
    k of Llama and its relatives."""
    return rows.reshape(-1, 2, size // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path: Path,
    case: GgufCase,
    kind: gguf.GGMLQuantizationType,
    seed: int,
    add_tokenizer: Callable[[gguf.GGUFWriter], None] = add_small_tokenizer,
) -> PreTrainedModel:
    """Writes a file whose matrices are of type `kind` and returns transformers' model with the
    same weights: dequantised, and rounded to FP16 as the target's are.

    Of a type that the package only reads, one matrix of a block has random blocks of weights.
    """
    settings = case.settings
    if gguf.GGML_QUANT_SIZES[kind][0] > 32:
        settings = settings | {"hidden_size": SUPER_BLOCK, "intermediate_size": SUPER_BLOCK}
    config = AutoConfig.for_model(**settings)
    with Float64():
        other = AutoModelForCausalLM.from_config(
            config, dtype=torch.float64, attn_implementation="eager"
        )
    writer = gguf.GGUFWriter(path, case.architecture)
    add_metadata(writer, config)
    add_tokenizer(writer)
    case.metadata(writer, config)
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == case.architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    chance = np.random.default_rng(seed)
    for name, weight in named(other):
        values = seeded_tensor(name, tuple(weight.shape), seed).numpy()
        if values.ndim == 1 or (kind.name in READ_ONLY and "up_proj" not in name):
            stored, stored_kind = values, KINDS.F32
        elif kind.name in READ_ONLY:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            shape = (len(values), values.shape[1] // block * size)
            stored, stored_kind = chance.integers(0, 64, shape, np.uint8), kind
        else:
            stored, stored_kind = gguf.quantize(values, kind), kind
        plain = np.array(gguf.dequantize(stored, stored_kind), np.float32)
        weight.data = torch.from_numpy(plain).reshape(weight.shape).half().double()
        if case.pairs and ("q_proj" in name or "k_proj" in name):
            stored = paired(stored, head_dim(config))
        if case.architecture == "gemma3" and "norm" in name:
            stored = stored + 1.0
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, f"gguf has no name for {name}"
        writer.add_tensor(stored_name, stored, raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other.eval()


def compare_weights(model: Model, other: PreTrainedModel, gemma: bool) -> Row:
    """All weights, sorted, so that names and fused matrices do not matter; where each belongs, the
    logits tell."""
    expected = [w.data + 1.0 if gemma and "norm" in name else w.data for name, w in named(other)]

    def values(tensors: list[torch.Tensor]) -> torch.Tensor:
        bits = torch.cat([tensor.half().flatten() for tensor in tensors]).view(torch.int16)
        return bits.sort().values

    ours, theirs = values(list(model.weights.values())), values(expected)
    if len(ours) != len(theirs):
        return Row("weights, bits", abs(len(ours) - len(theirs)), 0, "another number of weights")
    return Row("weights, bits", int((ours != theirs).sum()), 0, f"{len(ours)} weights")


def check(
    case: GgufCase, kind: gguf.GGMLQuantizationType, folder: Path, seed: int
) -> Iterator[Row]:
    folder.mkdir()
    path = folder / "model.gguf"
    other = write(path, case, kind, seed)
    model = load_model(path)
    tokens = seeded_tokens(model.config.vocab_size, TEXT, seed)
    expected = logits(other, tokens)
    yield compare_weights(model, other, case.architecture == "gemma3")
    if kind == KINDS.F16:
        yield from compare_logits(model, expected, tokens, case.bound)
    else:
        plain = reference_logits(model.config, model.weights, tokens)
        yield Row("logits, float64", difference(plain, expected), case.bound)
    if case.again:
        again = logits(read(folder, gguf_file=path.name), tokens)
        plain = reference_logits(model.config, model.weights, tokens)
        yield Row("logits, file read by transformers", difference(plain, again), case.bound)


def checks() -> list[Check]:
    return [
        Check(
            f"GGUF {case.name}",
            lambda folder, seed, case=case, kind=kind: check(case, KINDS[kind], folder, seed),
            kind,
        )
        for case in CASES
        for kind in case.kinds
    ]
