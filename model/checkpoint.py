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
    block.i.<linear layer>.bias [out]         of the layers in `biases`
    block.i.{q,k}_norm [head_dim]             with `head_norms`: RMSNorm of every head
    block.i.post_{attn,ffn}_norm              with `post_norms`: RMSNorm before the residual add

A norm's weight is the factor itself (Gemma's files may store the factor minus one). Rotary
embedding always pairs dimension i with i + head_dim/2; a format that pairs 2i with 2i+1 has the
rows of its q and k projections reordered when it is loaded (`unpermute_rope`), which changes no bit
of the attention scores, because a dot product over head_dim is exact and has no order.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from speq.model.arith import WeightOperand, prepare_verify
from speq.model.errors import CheckpointError
from speq.model.tokenizer import Tokenizer
from speq.model.vector_ops import rotary_frequencies

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = (
    "llama",
    "mistral",
    "smollm3",
    "phi3",
    "granite",
    "qwen2",
    "qwen3",
    "gemma3",
)
# No supported model comes near these: they bound what a hostile header can make a loader do.
MAX_SIZE, MAX_BLOCKS, MAX_HEAD_DIM = 1 << 24, 1 << 10, 1 << 12

# (name of the weight, shape) -> tensor, in the precision of the file
WeightReader = Callable[[str, tuple[int, ...]], torch.Tensor]


def check_architecture(name: str) -> None:
    """Raises CheckpointError, naming the architecture, if it is not supported."""
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture {name!r:.60} is not supported, only {', '.join(ARCHITECTURES)}"
        )


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of a decoder-only transformer. Raises CheckpointError if impossible.

    Parameters
    ----------
    architecture : str
        One of ARCHITECTURES. Only a name: what is computed is what the other members say.
    context : int
        Positions that the model was made for.
    tied_head : bool
        The embedding is the head as well.
    activation : str
        Of the gate: "silu" or "gelu_tanh".
    rope_divisors : tuple of float, optional
        What divides the rotary frequencies, one entry per pair (Llama 3 and linear scaling).
    embedding_scale, residual_scale, logit_scale : float
        What multiplies rows of the embedding, what a block adds to the residual stream, and what
        enters the head (so that the products with the head are the logits).
    biases : tuple of str
        The linear layers, of LINEARS, that have a bias.
    head_norms, post_norms : bool
        Queries and keys are normalised head by head; what a block adds is normalised.
    sliding_window : int, optional
        Limits attention to the last so many positions in the blocks in `windowed`.
    local_rope_base : float, optional
        Rotary base of these blocks, without divisors. By default they rotate like all others.
    windowed, unrotated : tuple of int
        Blocks with a sliding window, and without rotary embedding.
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
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    biases: tuple[str, ...] = ()
    head_norms: bool = False
    post_norms: bool = False
    sliding_window: int | None = None
    local_rope_base: float | None = None
    windowed: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.type is int or field.name == "sliding_window":
                limit = {"blocks": MAX_BLOCKS, "head_dim": MAX_HEAD_DIM}.get(field.name, MAX_SIZE)
                if type(value) is not int or not 1 <= value <= limit:
                    raise CheckpointError(f"{field.name} is {value!r:.40}, must be 1..{limit}")
            elif (field.type is float or field.name == "local_rope_base") and not (
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
        if not {*self.windowed, *self.unrotated} <= {*range(self.blocks)}:
            raise CheckpointError(f"windowed and unrotated must be blocks below {self.blocks}")
        if (self.sliding_window is None) != (not self.windowed):
            raise CheckpointError("sliding_window and windowed need each other")
        if not {*self.biases} <= {*LINEARS}:
            raise CheckpointError(f"biases must be of {', '.join(LINEARS)}")

    def is_global(self, block: int) -> bool:
        """True if `block` attends to all earlier positions, False if to a sliding window."""
        return block not in self.windowed

    def is_rotated(self, block: int) -> bool:
        """True if `block` rotates its queries and keys."""
        return block not in self.unrotated


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
    def digest(self) -> bytes:
        """SHA-256 of the weights: of each the name, a line break and the bits, row by row and
        little-endian, in the order of `tensor_shapes`."""
        digest = hashlib.sha256()
        for name, _ in tensor_shapes(self.config):
            digest.update(f"{name}\n".encode())
            digest.update(self.weights[name].contiguous().numpy().astype("<f2", copy=False).data)
        return digest.digest()

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
        if c.local_rope_base is None:
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
    linears = {
        "q_proj": (q_rows, c.hidden),
        "k_proj": (kv_rows, c.hidden),
        "v_proj": (kv_rows, c.hidden),
        "o_proj": (c.hidden, q_rows),
        "gate_proj": (c.ffn_hidden, c.hidden),
        "up_proj": (c.ffn_hidden, c.hidden),
        "down_proj": (c.hidden, c.ffn_hidden),
    }
    norms = {"q_proj": "attn_norm", "gate_proj": "ffn_norm"}  # before these
    for i in range(c.blocks):
        block = f"block.{i}."
        for name, shape in linears.items():
            if name in norms:
                yield block + norms[name], (c.hidden,)
            yield block + name, shape
        for name in c.biases:
            yield f"{block}{name}.bias", linears[name][:1]
        if c.head_norms:
            yield block + "q_norm", (c.head_dim,)
            yield block + "k_norm", (c.head_dim,)
        if c.post_norms:
            yield block + "post_attn_norm", (c.hidden,)
            yield block + "post_ffn_norm", (c.hidden,)
    yield "final_norm", (c.hidden,)
    if not c.tied_head:
        yield "head", (c.vocab_size, c.hidden)


@dataclass(frozen=True)
class Place:
    """Where a file has a weight: some rows of a tensor of this shape."""

    tensor: str
    shape: tuple[int, ...]
    rows: slice


def places(config: ModelConfig, stored_name: Callable[[str], str]) -> dict[str, Place]:
    """Where a file has each weight of a model, by name. Weights that it stores under one name are
    the rows of one tensor, in the order of `tensor_shapes` (fused projections)."""
    shapes = dict(tensor_shapes(config))
    stored = {name: stored_name(name) for name in shapes}
    ends: dict[str, int] = {}
    rows = {}
    for name, tensor in stored.items():
        start = ends.get(tensor, 0)
        ends[tensor] = start + shapes[name][0]
        rows[name] = slice(start, ends[tensor])
    return {
        name: Place(tensor, (ends[tensor], *shapes[name][1:]), rows[name])
        for name, tensor in stored.items()
    }


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


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError, naming the weight, if one is infinite or NaN: every product with it
    would be NaN."""
    for name, weight in weights.items():
        wrong = ~torch.isfinite(weight)
        if wrong.any():
            first = wrong.nonzero()[0].tolist()
            raise CheckpointError(
                f"{name} cannot be computed with: {int(wrong.sum())} of its weights are infinite, "
                f"NaN or too large for FP16, the first is {weight[tuple(first)].item()} at {first}"
            )


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
    """Rows [heads * head_dim, ...] with rotary pairs (2i, 2i+1) -> pairs (i, i + head_dim/2)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
