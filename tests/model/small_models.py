# SPDX-License-Identifier: Apache-2.0
"""Small random models, written in every checkpoint format, and a plain float64 transformer.

The reference is the textbook computation in the layout of Hugging Face's implementations (it is
compared with them for every architecture, see tests/oracle); it shares no code with `speq.model`
except the configuration.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from speq.model.checkpoint import LINEARS, Model, ModelConfig, tensor_shapes
from speq.model.loaders.gguf import stored_name as gguf_name
from speq.model.loaders.hf import stored_name as hf_name

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ t")


def byte_level_tokens() -> list[str]:
    """Vocabulary of a small byte-level BPE tokenizer: specials, bytes, merged tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]


def byte_level_tokenizer() -> Tokenizer:
    """The tokenizer of that vocabulary, as folders have it."""
    tokens = byte_level_tokens()
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def sentencepiece_tokens() -> tuple[list[str], list[float]]:
    """Vocabulary and scores of a small SentencePiece tokenizer with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [0.0] * len(pieces)
    for rank, piece in enumerate(["▁t", "he", "▁the", "in", "▁", *"abcdefghijklmnopqrstuvwxyz."]):
        pieces.append(piece)
        scores.append(-float(rank))
    return pieces, scores


VOCABULARY = {"bytes": len(byte_level_tokens()), "pieces": len(sentencepiece_tokens()[0])}


def small_config(architecture: str = "llama", **changes) -> ModelConfig:
    """A configuration of a few thousand weights with the features of the architecture."""
    gemma = architecture == "gemma3"
    blocks = 3 if gemma else 2
    windows = {"gemma3": (0, 1), "mistral": (0, 1), "phi3": (0, 1), "qwen3": (1,)}
    values = {
        "architecture": architecture,
        "vocab_size": VOCABULARY["bytes"],
        "hidden": 64,
        "ffn_hidden": 96,
        "blocks": blocks,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "context": 128,
        "norm_eps": 1e-5,
        "rope_base": 10_000.0,
        "attention_scale": 0.2 if gemma else 0.25,
        "tied_head": architecture in ("llama", "smollm3", "gemma3"),
        "activation": "gelu_tanh" if gemma else "silu",
        "embedding_scale": 8.0 if gemma else 1.0,
        "sliding_window": 6 if architecture in windows else None,
        "windowed": windows.get(architecture, ()),
        "local_rope_base": 10_000.0 if gemma else None,
        "biases": ("q_proj", "k_proj", "v_proj") if architecture == "qwen2" else (),
        "head_norms": architecture in ("qwen3", "gemma3"),
        "post_norms": gemma,
        "unrotated": (1,) if architecture == "smollm3" else (),
    }
    if architecture == "granite":
        values |= {"embedding_scale": 6.0, "residual_scale": 0.22, "logit_scale": 1.25}
        values |= {"attention_scale": 0.3, "biases": LINEARS}
    return ModelConfig(**(values | changes))


def random_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Float32 weights that are exact in FP16: norms about 1, everything else about 1/sqrt(K)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config):
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm"):
            values = 1.0 + 0.2 * values
        elif name == "embedding":
            values = values / config.embedding_scale
        else:
            values = values / shape[-1] ** 0.5
        weights[name] = values.to(torch.float16).to(torch.float32)
    return weights


def permute_rope(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows with rotary pairs (i, i + head_dim/2) -> pairs (2i, 2i + 1)."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def interleaved(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with q and k rows in the order of llama.cpp and llama2.c."""

    def is_rotated(name: str) -> bool:
        return name.removesuffix(".bias").endswith(("q_proj", "k_proj"))

    return {
        name: permute_rope(w, config.head_dim) if is_rotated(name) else w
        for name, w in weights.items()
    }


def stored(
    weights: dict[str, torch.Tensor], stored_name: Callable[[str], str]
) -> dict[str, torch.Tensor]:
    """The weights under a file's names; those with the same name are the rows of one tensor."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, weight in weights.items():
        parts.setdefault(stored_name(name), []).append(weight)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pieces: bool = False,
) -> None:
    """Writes a GGUF file; matrices in quantisation `kind`, with one of the two tokenizers."""
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.blocks)
    writer.add_feed_forward_length(config.ffn_hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_context_length(config.context)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.architecture == "granite":
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(1 / config.logit_scale)
        writer.add_attention_scale(config.attention_scale)
    if pieces:
        tokens, scores = sentencepiece_tokens()
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        special = (1, 2)
        writer.add_bos_token_id(1)
    else:
        tokens = byte_level_tokens()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(list(MERGES))
        special = (0, 1, 2)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_eos_token_id(2)
    if config.architecture in ("llama", "smollm3", "granite"):
        weights = interleaved(config, weights)
    for name, weight in stored(weights, lambda name: gguf_name(name, config.architecture)).items():
        data = weight.numpy()
        if data.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hf_settings(config: ModelConfig) -> dict:
    """The config.json of a configuration without RoPE scaling."""
    gemma = config.architecture == "gemma3"
    settings = {
        "model_type": "gemma3_text" if gemma else config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_head,
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "eos_token_id": 2,
    }
    kinds = ("full_attention", "sliding_attention")
    match config.architecture:
        case "gemma3":
            settings["query_pre_attn_scalar"] = config.attention_scale**-2
            settings["sliding_window"] = config.sliding_window
            settings["rope_local_base_freq"] = config.local_rope_base
            settings["layer_types"] = [kinds[i in config.windowed] for i in range(config.blocks)]
        case "mistral" | "phi3":
            settings["sliding_window"] = config.sliding_window
        case "qwen2" | "qwen3" if config.windowed:
            settings["use_sliding_window"] = True
            settings["sliding_window"] = config.sliding_window
            settings["max_window_layers"] = config.windowed[0]
        case "smollm3":
            settings["no_rope_layers"] = [
                int(i not in config.unrotated) for i in range(config.blocks)
            ]
        case "granite":
            settings["embedding_multiplier"] = config.embedding_scale
            settings["residual_multiplier"] = config.residual_scale
            settings["attention_multiplier"] = config.attention_scale
            settings["logits_scaling"] = 1 / config.logit_scale
            settings["attention_bias"] = "o_proj" in config.biases
            settings["mlp_bias"] = "up_proj" in config.biases
    return settings


def write_hf(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float16,
    shards: int = 1,
) -> None:
    """Writes a Hugging Face folder with a byte-level tokenizer."""
    gemma = config.architecture == "gemma3"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_settings(config)))
    changed = {
        name: (w - 1.0 if gemma and name.endswith("norm") else w).to(dtype)
        for name, w in weights.items()
    }
    tensors = stored(changed, lambda name: hf_name(name, config.architecture))
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / f"model-{i + 1:05}-of-{shards:05}.safetensors")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))


def write_llama2c(
    path: Path, config: ModelConfig, weights: dict[str, torch.Tensor], version: int = 0
) -> None:
    """Writes a llama2.c checkpoint and, beside it, tokenizer.bin."""
    weights = interleaved(config, weights)

    def blocks(*parts: str) -> list[torch.Tensor]:
        return [weights[f"block.{i}.{part}"] for part in parts for i in range(config.blocks)]

    attention, ffn = LINEARS[:4], ("gate_proj", "down_proj", "up_proj")
    sizes = (config.hidden, config.ffn_hidden, config.blocks, config.heads, config.kv_heads)
    if version == 0:
        vocabulary = config.vocab_size if config.tied_head else -config.vocab_size
        header = struct.pack("<7i", *sizes, vocabulary, config.context)
        arrays = [weights["embedding"], *blocks("attn_norm", *attention, "ffn_norm", *ffn)]
        arrays += [weights["final_norm"], torch.zeros(config.context * config.head_dim)]
    else:
        header = struct.pack("<Ii7i", 0x616B3432, 1, *sizes, config.vocab_size, config.context)
        header = (header + bytes([config.tied_head])).ljust(256, b"\0")
        arrays = [*blocks("attn_norm", "ffn_norm"), weights["final_norm"], weights["embedding"]]
        arrays += blocks(*attention, *ffn)
    if not config.tied_head:
        arrays.append(weights["head"])
    path.write_bytes(header + b"".join(a.numpy().astype("<f4").tobytes() for a in arrays))
    data = struct.pack("<i", 6)
    for token, score in zip(*sentencepiece_tokens(), strict=True):
        text = token.replace("▁", " ").encode()
        data += struct.pack("<fi", score, len(text)) + text
    (path.parent / "tokenizer.bin").write_bytes(data)


def reference_logits(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokens: list[int],
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Logits [T, V] of a causal pass over `tokens`, computed plainly in `dtype`."""
    c = config
    weights = {name: w.to(dtype) for name, w in weights.items()}
    positions = torch.arange(len(tokens))
    distance = positions[:, None] - positions
    h = weights["embedding"][torch.tensor(tokens)] * c.embedding_scale

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weights[name]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ weights[name].T
        return y + weights[name + ".bias"] if name + ".bias" in weights else y

    def rotate(x: torch.Tensor, base: float, divisors: torch.Tensor) -> torch.Tensor:
        frequency = base ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
        angle = positions[:, None, None] * (frequency / divisors)
        cos, sin = angle.cos().repeat(1, 1, 2).to(dtype), angle.sin().repeat(1, 1, 2).to(dtype)
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    for i in range(c.blocks):
        block = f"block.{i}."
        windowed = i in c.windowed
        local = windowed and c.local_rope_base
        base = c.local_rope_base if local else c.rope_base
        divisors = torch.ones(c.head_dim // 2, dtype=torch.float64)
        if c.rope_divisors and not local:
            divisors = torch.tensor(c.rope_divisors, dtype=torch.float64)
        x = norm(block + "attn_norm", h)
        q, k, v = (linear(block + name, x).unflatten(-1, (-1, c.head_dim)) for name in LINEARS[:3])
        if block + "q_norm" in weights:
            q, k = norm(block + "q_norm", q), norm(block + "k_norm", k)
        if i not in c.unrotated:
            q, k = rotate(q, base, divisors), rotate(k, base, divisors)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * c.attention_scale
        hidden = (distance < 0) | (windowed and distance >= (c.sliding_window or 0))
        weight = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        y = linear(block + "o_proj", torch.einsum("hts,shd->thd", weight, v).flatten(1))
        y = norm(block + "post_attn_norm", y) if block + "post_attn_norm" in weights else y
        h = h + y * c.residual_scale
        x = norm(block + "ffn_norm", h)
        gate, up = linear(block + "gate_proj", x), linear(block + "up_proj", x)
        if c.activation == "silu":
            gate = torch.nn.functional.silu(gate)
        else:
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
        y = linear(block + "down_proj", gate * up)
        y = norm(block + "post_ffn_norm", y) if block + "post_ffn_norm" in weights else y
        h = h + y * c.residual_scale
    head = weights["embedding"] if c.tied_head else weights["head"]
    return norm("final_norm", h) @ head.T * c.logit_scale


#: Where a token's activations can leave FP16's range, by the layer that shows it.
OVERFLOWS = ("q_proj", "scores of q", "scores of k", "values", "gate_proj", "down_proj")
#: What the prompt's passes of a model of two blocks do not compute.
BEHIND_PREFILL = ("block.1.scores of q", "block.1.gate_proj", "block.1.down_proj", "head")


def overflowing(model: Model, token: int, layer: str, axis: int = 0, scale: float = 1.0) -> Model:
    """The model, but wherever `token` stands, and nowhere else, a result of `layer` is not finite:
    "head", or one of `OVERFLOWS` behind a block, as in "block.1.scores of k".

    Component `axis` of the residual stream is the token's alone; weights that amplify it by `scale`
    times enough do the rest. The model must have no norm behind that layer's input.
    """
    weights = {name: w.clone() for name, w in model.weights.items()}
    c = model.config
    weights["embedding"][:, axis] = 0
    weights["embedding"][token, axis] = 8 / c.embedding_scale
    for name, w in weights.items():
        if name.endswith(("o_proj", "down_proj")):
            w[axis] = 0
        elif name.endswith("_proj"):
            w[:, axis] = 0

    def amplify(name: str, row: int, factor: float) -> None:
        # Beside a large weight, small ones are large as well in a draft.
        weights[name][row] = 0
        weights[name][row, axis] = factor

    block = layer[: layer.rfind(".") + 1]
    match layer.removeprefix(block):
        case "head":
            weights["final_norm"][axis] = 60_000 * scale
        case "q_proj":
            weights[block + "attn_norm"][axis] = 60_000 * scale
        case "gate_proj":
            weights[block + "ffn_norm"][axis] = 60_000 * scale
        case "scores of q" | "scores of k" as scores:  # whatever their rotation
            for row in (0, c.head_dim // 2):
                amplify(f"{block}{scores[-1]}_proj", row, 60_000 * scale)
        case "values":
            amplify(block + "v_proj", 0, 60_000 * scale)
        case "down_proj":
            amplify(block + "gate_proj", 0, 100)
            amplify(block + "up_proj", 0, 600 * scale)
    return Model(f"overflowing {model.name}", c, weights, tokenizer=None)


def perplexity(logits: torch.Tensor, tokens: list[int]) -> float:
    """Perplexity of tokens[1:] under the logits of the positions before them."""
    chosen = logits[:-1].to(torch.float64).log_softmax(-1)
    return math.exp(-chosen.gather(1, torch.tensor(tokens[1:])[:, None]).mean())


def random_tokens(config: ModelConfig, count: int, seed: int) -> list[int]:
    """Token ids drawn uniformly."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()
