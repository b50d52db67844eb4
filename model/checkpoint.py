# SPDX-License-Identifier: Apache-2.0
"""Models as the accelerator sees them: configuration, FP16 weights, tokenizer.

The target model of every checkpoint is its FP16 rounding (to nearest even): that model, not the
file's own precision, is what decoding reproduces losslessly. The file formats are read by
`speq.model.loaders`; this file holds what they share. Files are untrusted: a loader checks counts
and sizes against the file's length before it believes them, never unpickles, and reports anything
wrong as one `CheckpointError`.

Names of weights, the same for every format (i is the block number; shapes are [out, in] or [n]):

    embedding [V, H]    head [V, H] (absent if tied to the embedding)    final_norm [H]
    block.i.{q,k,v,o,gate,up,down}_proj       the seven linear layers, in the order of LINEARS
    block.i.{attn,ffn}_norm                   RMSNorm before attention and before the FFN
    block.i.{q,k,v}_proj.bias                 Qwen2
    block.i.{q,k}_norm [head_dim]             Qwen3, Gemma 3
    block.i.post_{attn,ffn}_norm              Gemma 3: RMSNorm before the residual add

A norm's weight is the factor itself (Gemma's files may store the factor minus one). Rotary
embedding always pairs dimension i with i + head_dim/2; a format that pairs 2i with 2i+1 has the
rows of its q and k projections reordered when it is loaded (`unpermute_rope`), which changes no bit
of the attention scores, because a dot product over head_dim is exact and has no order.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from speq.model.arith import WeightOperand, prepare_verify
from speq.model.tokenizer import Tokenizer
from speq.model.vector_ops import rotary_frequencies

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# No supported model comes near these: they bound what a hostile header can make a loader do.
MAX_SIZE, MAX_BLOCKS, MAX_HEAD_DIM = 1 << 24, 1 << 10, 1 << 12

# (name of the weight, shape) -> tensor, in the precision of the file
WeightReader = Callable[[str, tuple[int, ...]], torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: missing, damaged, inconsistent or unsupported."""


def check_architecture(name: str) -> None:
    """Raises CheckpointError, naming the architecture, if it is not supported."""
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture {name!r:.60} is not supported, only {', '.join(ARCHITECTURES)}"
        )


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of a decoder-only transformer. Raises CheckpointError if impossible.

    `rope_divisors` divides the rotary frequencies (one entry per pair; Llama 3 and linear scaling).
    `sliding_window` (Gemma 3) limits attention to the last so many positions, with rotary base
    `local_rope_base` and no divisors, in every block but each `global_every`-th.
    """

    architecture: str
    vocab_size: int
    hidden: int
    ffn_hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    rope_base: float
    attention_scale: float
    tied_head: bool
    rope_divisors: tuple[float, ...] | None = None
    activation: str = "silu"
    embedding_scale: float = 1.0
    sliding_window: int | None = None
    global_every: int = 1
    local_rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.name == "sliding_window" and value is not None):
                limit = {"blocks": MAX_BLOCKS, "head_dim": MAX_HEAD_DIM}.get(field.name, MAX_SIZE)
                if type(value) is not int or not 1 <= value <= limit:
                    raise CheckpointError(f"{field.name} is {value!r:.40}, must be 1..{limit}")
            elif field.type is float and not (
                type(value) is float and 1e-30 < value < 1e12  # NaN fails both comparisons
            ):
                raise CheckpointError(f"{field.name} is {value!r:.40}, must be a positive number")
        check_architecture(self.architecture)
        if self.heads % self.kv_heads:
            raise CheckpointError(f"{self.heads} heads do not divide into {self.kv_heads} KV heads")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}, must be even")
        if self.rope_divisors is not None:
            if len(self.rope_divisors) != self.head_dim // 2:
                raise CheckpointError("rope_divisors must have head_dim / 2 entries")
            if not all(math.isfinite(d) and d > 0 for d in self.rope_divisors):
                raise CheckpointError("rope_divisors must be positive numbers")

    def is_global(self, block: int) -> bool:
        """True if `block` attends to all earlier positions, False if to a sliding window."""
        return self.sliding_window is None or block % self.global_every == self.global_every - 1


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: `weights` maps the names above to float16 tensors, which must not change
    after the first pass."""

    name: str
    config: ModelConfig
    weights: dict[str, torch.Tensor]
    tokenizer: Tokenizer

    def linear_weight(self, name: str) -> torch.Tensor:
        """Float16 [O, K] weight of linear layer `name`: "block.i.q_proj" ... or "head"."""
        if name == "head" and self.config.tied_head:
            return self.weights["embedding"]
        return self.weights[name]

    @cached_property
    def operands(self) -> dict[str, WeightOperand]:
        """Every linear layer inspected once for verify passes; shares the weights' memory."""
        return {
            name: prepare_verify(self.linear_weight(name)) for name in linear_names(self.config)
        }

    @cached_property
    def rotary_frequencies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of global blocks and of blocks with a sliding window, float32 [head_dim / 2] each."""
        c = self.config
        everywhere = rotary_frequencies(c.rope_base, c.head_dim, c.rope_divisors)
        if c.sliding_window is None:
            return everywhere, everywhere
        return everywhere, rotary_frequencies(c.local_rope_base, c.head_dim)


def linear_names(config: ModelConfig) -> list[str]:
    """Names of all linear layers in the order in which a pass uses them, "head" last."""
    names = [f"block.{i}.{linear}" for i in range(config.blocks) for linear in LINEARS]
    return [*names, "head"]


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape (O, K) of every linear layer by name, "head" included."""
    shapes = dict(tensor_shapes(config))
    shapes.setdefault("head", shapes["embedding"])
    return {name: (shapes[name][0], shapes[name][1]) for name in linear_names(config)}


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every weight that a model of this configuration has."""
    c = config
    q_rows, kv_rows = c.heads * c.head_dim, c.kv_heads * c.head_dim
    yield "embedding", (c.vocab_size, c.hidden)
    for i in range(c.blocks):
        block = f"block.{i}."
        yield block + "attn_norm", (c.hidden,)
        yield block + "q_proj", (q_rows, c.hidden)
        yield block + "k_proj", (kv_rows, c.hidden)
        yield block + "v_proj", (kv_rows, c.hidden)
        yield block + "o_proj", (c.hidden, q_rows)
        yield block + "ffn_norm", (c.hidden,)
        yield block + "gate_proj", (c.ffn_hidden, c.hidden)
        yield block + "up_proj", (c.ffn_hidden, c.hidden)
        yield block + "down_proj", (c.hidden, c.ffn_hidden)
        if c.architecture == "qwen2":
            yield block + "q_proj.bias", (q_rows,)
            yield block + "k_proj.bias", (kv_rows,)
            yield block + "v_proj.bias", (kv_rows,)
        if c.architecture in ("qwen3", "gemma3"):
            yield block + "q_norm", (c.head_dim,)
            yield block + "k_norm", (c.head_dim,)
        if c.architecture == "gemma3":
            yield block + "post_attn_norm", (c.hidden,)
            yield block + "post_ffn_norm", (c.hidden,)
    yield "final_norm", (c.hidden,)
    if not c.tied_head:
        yield "head", (c.vocab_size, c.hidden)


def collect_weights(config: ModelConfig, read: WeightReader) -> dict[str, torch.Tensor]:
    """Reads every weight of the model and rounds it to float16.

    `read(name, shape)` returns the tensor in the precision of the file, or raises CheckpointError;
    it must check the shape before it allocates. Warns if finite weights overflow FP16.
    """
    weights = {}
    for name, shape in tensor_shapes(config):
        tensor = read(name, shape)
        weights[name] = tensor.to(torch.float16).contiguous()
        low, high = torch.aminmax(tensor)
        if not (low > -65520 and high < 65520) and bool(
            (torch.isinf(weights[name]) & torch.isfinite(tensor)).any()
        ):
            warnings.warn(f"{name} has weights that are too large for FP16", stacklevel=2)
    return weights


def expect_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises CheckpointError, naming the tensor, if its shape is not the expected one."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"tensor {name!r} has shape {list(found)}, not {list(expected)}")


def expect_all_read(stored: Iterable[str], read: Iterable[str]) -> None:
    """Raises CheckpointError if the file has a tensor that was not read, for example a bias that
    the architecture does not know: it would be another model without it."""
    unread = sorted(set(stored) - set(read))
    if unread:
        raise CheckpointError(f"tensor {unread[0]!r:.80} does not belong to this architecture")


def unpermute_rope(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [heads * head_dim, K] with rotary pairs (2i, 2i+1) -> pairs (i, i + head_dim/2)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.transpose(1, 2).reshape(rows.shape)
