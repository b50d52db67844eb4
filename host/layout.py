# SPDX-License-Identifier: Apache-2.0
"""Where a model lies in the accelerator's memory, in which form, and the programs that run it.

The forms are those of `speq.hw.control.descriptor`; a driver on another board needs the same ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch

from speq.host.checks import check_vector_unit
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.descriptor import DESCRIPTOR_BYTES, Descriptor, DescriptorKind
from speq.hw.engine_config import BLOCK_ACTIVATIONS, BLOCK_MAGNITUDE_BITS, DRAFT_LANES, Mode
from speq.model.arith import BlockActivations
from speq.model.checkpoint import ModelConfig, linear_shapes
from speq.model.format import EncodedTensor, encode
from speq.model.number_format import draft_words, residual_words
from speq.model.schedule import (
    Linears,
    Scores,
    Stage,
    Step,
    WeightedValues,
    pass_schedule,
    stages,
)

#: log2 of the tokens in the ring: more than any array commits in a step.
RING_LOG2 = 8
#: What the programs are called.
PROGRAM_NAMES = {
    PassKind.SINGLE: "single",
    PassKind.DRAFT: "draft",
    PassKind.VERIFY: "verify",
    PassKind.MOVE: "move",
}

_MAX_SHARING = 255  # what the descriptor's field holds
_WORD = 2  # bytes of a weight word, of an FP16 number
_RESULT = 4  # bytes of an FP32 result


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is at least `value`."""
    return ceil_div(value, multiple) * multiple


def activation_count(k: int, config: AcceleratorConfig) -> int:
    """Words in memory of `k` activation words: whole beats of the data port."""
    size = config.activation_bytes
    return round_up(k * size, config.data.beat_bytes) // size


def pack_block_activations(x: BlockActivations) -> np.ndarray:
    """Words of the activation store for draft mode: uint8 [ceil(K / 4), bytes], little-endian.

    For each row of x, from the lowest bits on, `BLOCK_ACTIVATIONS`: sign and magnitude of four
    activations and the exponent of their block.
    """
    rows, k = x.mantissa.shape
    mantissa = np.pad(x.mantissa.numpy(), ((0, 0), (0, -k % DRAFT_LANES)))
    signs = (mantissa < 0).astype(np.uint8) << BLOCK_MAGNITUDE_BITS
    lanes = (np.abs(mantissa).view(np.uint8) | signs).reshape(rows, -1, DRAFT_LANES)
    block = np.arange(lanes.shape[1]) * DRAFT_LANES // x.block
    exponents = x.exponent.numpy()[:, block, None].astype(np.uint8)
    fields = np.concatenate((lanes, exponents), axis=2, dtype=np.uint8)
    bits = np.unpackbits(fields, axis=2, bitorder="little")[..., : BLOCK_ACTIVATIONS.size]
    return np.packbits(bits.swapaxes(0, 1).reshape(len(block), -1), axis=1, bitorder="little")


def draft_activation_words(x: BlockActivations, config: AcceleratorConfig) -> np.ndarray:
    """Block activations of the drafting rows as they lie in memory: uint8 [words,
    activation_bytes], whole beats of the data port; what x does not fill is 0."""
    packed = pack_block_activations(x)
    words = np.zeros((activation_count(len(packed), config), config.activation_bytes), np.uint8)
    words[: len(packed), : packed.shape[1]] = packed
    return words


def ranking_bytes(config: AcceleratorConfig) -> int:
    """Bytes of a row of a ranking in memory: pairs of index and logit."""
    return 8 * config.choices


def ranking_margin(content: np.ndarray) -> float:
    """The logit margin that a row of a ranking in memory, uint8 [bytes], tells."""
    ranking = content.view("<f4")
    margin = ranking[1] - ranking[3]
    return math.inf if np.isnan(margin) else float(margin)


def results_bytes(tokens: int, o: int, cols: int) -> int:
    """Bytes of the FP32 results of a GEMM."""
    return ceil_div(o, cols) * cols * tokens * _RESULT


def unpack_results(content: np.ndarray, tokens: int, o: int, cols: int) -> np.ndarray:
    """Results in memory, uint8 [tile][token][column][4], as float32 [tokens, o]."""
    tiles = content.view(np.float32).reshape(-1, tokens, cols)
    return tiles.transpose(1, 0, 2).reshape(tokens, -1)[:, :o]


def retile(plane: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """A plane [tiles, words, columns] of `rows` outputs, cut into tiles of `cols` outputs."""
    if plane.shape[2] == cols:
        return plane
    return tiled(outputs(plane, rows), cols)


def outputs(plane: np.ndarray, rows: int) -> np.ndarray:
    """Words of the first outputs of a plane [tiles, words, columns]: [rows, words]."""
    return plane.transpose(0, 2, 1).reshape(-1, plane.shape[1])[:rows]


def tiled(rows: np.ndarray, cols: int) -> np.ndarray:
    """Words of outputs [O, words] -> [ceil(O / cols), words, cols], with zeros beyond O."""
    rows = np.pad(rows, ((0, -len(rows) % cols), (0, 0)))
    return np.ascontiguousarray(rows.reshape(-1, cols, rows.shape[1]).transpose(0, 2, 1))


def padded_groups(group_bytes: np.ndarray, config: AcceleratorConfig) -> np.ndarray:
    """Group bytes [tiles, groups, columns] with each tile padded to whole beats: [tiles, bytes]."""
    tiles = group_bytes.reshape(len(group_bytes), -1)
    return np.pad(tiles, ((0, 0), (0, -tiles.shape[1] % config.data.beat_bytes)))


class Region(NamedTuple):
    """Bytes of memory: the first and one behind the last."""

    start: int
    stop: int


class Kind(Enum):
    """What a part of the memory holds. The numbers are those of image files (docs/image.md)."""

    PLAIN_WEIGHTS = 1
    DRAFT_PLANE = 2
    RESIDUAL_PLANE = 3
    GROUP_BYTES = 4
    KEYS = 5
    VALUES = 6
    ACTIVATIONS = 7
    DRAFT_ACTIVATIONS = 8
    PROGRAM = 9
    RANKING = 10
    RING = 11
    RESULTS = 12
    EMBEDDING = 13
    ROTARY = 14
    CHANNELS = 15
    TEXT = 16
    STREAM = 17
    TEMPORARY = 18
    QUERIES = 19
    SOFTMAX_WEIGHTS = 20
    SCORES = 21
    ATTENDED = 22
    LOGITS = 23

    @property
    def is_given(self) -> bool:
        """Whether it holds something before the first run; all else is written by then or later."""
        return self in _GIVEN


_GIVEN = (
    Kind.PLAIN_WEIGHTS,
    Kind.DRAFT_PLANE,
    Kind.RESIDUAL_PLANE,
    Kind.GROUP_BYTES,
    Kind.PROGRAM,
    Kind.EMBEDDING,
    Kind.ROTARY,
    Kind.CHANNELS,
)


class Part(NamedTuple):
    """A part of the memory: of weights with the name of their linear layer, of a program with that
    of its kind of pass, of tables and vectors as in `speq.host.places`, else without a
    name."""

    kind: Kind
    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Weights:
    """A linear layer [o, k] in memory: with `encoded`, draft plane, residual plane and group bytes;
    else `plane` holds plain FP16 words. Draft passes compute its first `drafted` outputs."""

    o: int
    k: int
    encoded: bool
    drafted: int
    plane: int
    residual: int = 0
    groups: int = 0

    def mode(self, kind: PassKind) -> Mode:
        """The array's mode for it in a pass."""
        if not self.encoded:
            return Mode.BYPASS
        return Mode.DRAFT if kind is PassKind.DRAFT else Mode.VERIFY


class MemoryLayout(ABC):
    """Addresses of everything that a decoder needs in the accelerator's memory.

    What does not depend on the vector work of a pass: weights, the KV cache and products.
    `speq.host.programs.ModelLayout` is all of it.

    Parameters
    ----------
    config : AcceleratorConfig
    model : ModelConfig
    encoded : names of the linear layers that are encoded; the others are plain FP16
    capacity : int
        Entries of the KV cache.
    base : int
        First byte to use, a multiple of the configuration's `load_alignment`. Distances from it are
        the same for every base.
    drafted_outputs : int, optional
        Draft passes compute only the first so many outputs of an encoded head; all when not given.

    Attributes
    ----------
    read, write : Region
        What the accelerator reads and what it writes.
    weights : Weights by name of the linear layer
    keys, values : int
        Of the KV cache: keys [block][tile of C entries][kv_head][head_dim][C], values
        [block][kv_head][tile of C dimensions][capacity][C].
    programs : address by PassKind
    activations, draft_activations, results, logits, ranking, ring : int
    queries, softmax_weights : int
        Activations of attention's products, at `attention_stride` for each KV head.
    scores, attended : int
        Results of attention's products, at `attention_result_stride`.
    parts : list of Part
        All of these, by rising address.

    Raises
    ------
    ValueError
        If the model does not fit the configuration, or this has no vector unit.
    """

    keys: int = 0
    values: int = 0
    activations: int = 0
    draft_activations: int = 0
    queries: int = 0
    softmax_weights: int = 0
    scores: int = 0
    attended: int = 0
    ranking: int = 0
    ring: int = 0
    results: int = 0
    logits: int = 0
    programs: dict[PassKind, int]
    read: Region
    write: Region

    def __init__(
        self,
        config: AcceleratorConfig,
        model: ModelConfig,
        encoded: Collection[str],
        capacity: int,
        base: int = 0,
        *,
        drafted_outputs: int | None = None,
    ) -> None:
        check_vector_unit(config)
        self.config, self.model = config, model
        engine = config.engine
        #: Entries of the KV cache, whole tiles.
        self.capacity = round_up(capacity, engine.cols)
        if excesses := exceeded_limits(config, model, capacity):
            raise ValueError(str(excesses[0]))
        if base % config.load_alignment:
            raise ValueError(f"base is {base:#x}; expected a multiple of {config.load_alignment}")
        self.parts: list[Part] = []
        self._base = self._end = base
        # Whole bursts: those that are cut at both ends hide less of the memory's latency.
        self._alignment = max(
            config.alignment, config.weights.burst_beats * config.weights.beat_bytes
        )
        drafted = drafted_outputs if "head" in encoded else None
        self.weights = {
            name: self._place(name, self._stored_outputs(name, o), k, name in encoded, drafted)
            for name, (o, k) in linear_shapes(model).items()
        }
        self._place_buffers()
        if self._end > 1 << config.address_bits:
            raise ValueError(
                f"the model ends at {self._end:#x}; addresses have {config.address_bits} bits"
            )

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self._end - self._base

    def _take_cache(self) -> None:
        """Take the bytes of the KV cache."""
        model = self.model
        entries = model.blocks * model.kv_heads * self.capacity * _WORD
        self.keys = self._take(Kind.KEYS, entries * model.head_dim)
        self.values = self._take(
            Kind.VALUES, entries * round_up(model.head_dim, self.config.engine.cols)
        )

    def _take_programs(self) -> None:
        """Take the bytes of the programs."""
        self.programs = {
            kind: self._take(Kind.PROGRAM, self._program_size(kind), PROGRAM_NAMES[kind])
            for kind in PassKind
        }

    def _take_draft_activations(self) -> None:
        """Take the bytes of the draft activations of any linear layer."""
        words = activation_count(ceil_div(self._longest, DRAFT_LANES), self.config)
        self.draft_activations = self._take(
            Kind.DRAFT_ACTIVATIONS, words * self.config.activation_bytes
        )

    @property
    def _longest(self) -> int:
        """The largest K of a linear layer."""
        return max(weights.k for weights in self.weights.values())

    @property
    def sharing(self) -> int:
        """Query heads per KV head."""
        return self.model.heads // self.model.kv_heads

    @property
    def value_tiles(self) -> int:
        """Tiles of a head's values."""
        return ceil_div(self.model.head_dim, self.config.engine.cols)

    def _take(self, kind: Kind, size: int, name: str = "") -> int:
        """The address of so many more bytes."""
        address = self._base + round_up(self._end - self._base, self._alignment)
        self._end = round_up(address + size, self.config.alignment)
        self.parts.append(Part(kind, name, address, size))
        return address

    @abstractmethod
    def _place_buffers(self) -> None:
        """Take the bytes of everything but weights."""

    @abstractmethod
    def _stored_outputs(self, name: str, o: int) -> int:
        """Outputs in memory of a linear layer with o outputs."""

    @abstractmethod
    def order(self, name: str) -> np.ndarray | None:
        """Which output of the model each output of a linear layer in memory is, -1 where it is
        padding, int64 [outputs in memory]; None if they are the same."""

    def _place(self, name: str, o: int, k: int, encoded: bool, drafted_head: int | None) -> Weights:
        config = self.config
        drafted = drafted_head if drafted_head and name == "head" else o
        number_format, cols = config.engine.format, config.engine.cols
        tiles = ceil_div(o, cols)
        if not encoded:
            size = tiles * k * cols * _WORD
            return Weights(o, k, False, drafted, self._take(Kind.PLAIN_WEIGHTS, size, name))
        groups = round_up(ceil_div(k, number_format.group) * cols, config.data.beat_bytes)
        plane = self._take(Kind.DRAFT_PLANE, tiles * draft_words(k) * cols * _WORD, name)
        residual = self._take(Kind.RESIDUAL_PLANE, tiles * residual_words(k) * cols * _WORD, name)
        group_bytes = self._take(Kind.GROUP_BYTES, tiles * groups, name)
        return Weights(o, k, True, drafted, plane, residual, group_bytes)

    def _result_size(self, name: str) -> int:
        engine = self.config.engine
        size = results_bytes(engine.rows, self.weights[name].o, engine.cols)
        return round_up(size, self.config.alignment)

    def results_of(self, names: Collection[str]) -> list[int]:
        """Addresses of the results of linear layers that run in one stage."""
        sizes = [self._result_size(name) for name in names]
        return [self.results + sum(sizes[:i]) for i in range(len(sizes))]

    def batch_bytes(self, k: int) -> int:
        """Distance of the batches' activations in an attention product over k."""
        return activation_count(k, self.config) * self.config.activation_bytes

    def attention_stride(self, k: int) -> int:
        """Distance of the KV heads' activations in an attention product over k."""
        return round_up(self.sharing * self.batch_bytes(k), self.config.alignment)

    def attention_result_stride(self, o: int) -> int:
        """Distance of the KV heads' results in an attention product with o outputs."""
        engine = self.config.engine
        size = results_bytes(engine.rows * self.sharing, o, engine.cols)
        return round_up(size, self.config.alignment)

    @property
    def key_stride(self) -> int:
        """Distance of the tiles of a head's keys."""
        model = self.model
        return model.kv_heads * model.head_dim * self.config.engine.cols * _WORD

    @property
    def value_stride(self) -> int:
        """Distance of the tiles of a head's values."""
        return self.capacity * self.config.engine.cols * _WORD

    def keys_address(self, block: int, tile: int, head: int = 0) -> int:
        """Of a tile of a KV head's keys."""
        head_bytes = self.key_stride // self.model.kv_heads
        tiles = self.capacity // self.config.engine.cols
        return self.keys + (block * tiles + tile) * self.key_stride + head * head_bytes

    def values_address(self, block: int, head: int, tile: int = 0, entry: int = 0) -> int:
        """Of an entry of a tile of a KV head's values."""
        number = (block * self.model.kv_heads + head) * self.value_tiles + tile
        return self.values + number * self.value_stride + entry * self.config.engine.cols * _WORD

    @abstractmethod
    def draft_ranking(self, index: int) -> int:
        """Address of the ranking of a draft pass of this number in its chain."""

    def schedule(self, kind: PassKind) -> list[Step]:
        """The steps of a pass."""
        return pass_schedule(self.model, prefill=kind is PassKind.SINGLE)

    def stages(self, kind: PassKind) -> list[Stage]:
        """What the array computes in a pass."""
        return stages(self.schedule(kind))

    def program(self, kind: PassKind, reranked: int = 0) -> list[Descriptor]:
        """The program of a pass; of a draft pass one that computes so many of the best logits of an
        encoded head exactly."""
        return [descriptor for descriptor, _ in self._named_program(kind, reranked)]

    def program_content(self, kind: PassKind, reranked: int = 0) -> bytes:
        """The program of a pass as it lies in memory, with zeros behind it up to the end of its
        part."""
        content = b"".join(descriptor.pack() for descriptor in self.program(kind, reranked))
        return content.ljust(self._program_size(kind), b"\0")

    def longest_program(self, reranked: int = 0) -> int:
        """Descriptors of the longest program."""
        return max(len(self.program(kind, reranked)) for kind in self.programs)

    def product_at(self, kind: PassKind, address: int) -> str:
        """The name of the product whose descriptor is at an address of a pass's program: a linear
        layer's, or an attention's as in "block.3.scores" and "block.3.values".

        Raises ValueError if there is none.
        """
        program = self._named_program(kind, reranked=1)  # others end before its last product
        index, rest = divmod(address - self.programs[kind], DESCRIPTOR_BYTES)
        if rest or not 0 <= index < len(program) or not program[index][1]:
            raise ValueError(f"there is no product at {address:#x}")
        return program[index][1]

    @abstractmethod
    def _named_program(self, kind: PassKind, reranked: int) -> list[tuple[Descriptor, str]]:
        """The program of a pass with the names of its products; "" for other descriptors."""

    @abstractmethod
    def _program_size(self, kind: PassKind) -> int:
        """Most bytes of a program, RERANK and END included."""

    def _ended(
        self, program: list[tuple[Descriptor, str]], kind: PassKind, reranked: int
    ) -> list[tuple[Descriptor, str]]:
        """A program of which RERANK, if it is to have one, and END are missing."""
        if reranked and kind is PassKind.DRAFT and self.weights["head"].encoded:
            *program, (argmax, name) = program
            program.append((replace(argmax, ranking=0), name))
            program.append((self._rerank(reranked), name))
        return [*program, (Descriptor(DescriptorKind.END), "")]

    def products(self, kind: PassKind, stage: Stage) -> list[tuple[Descriptor, str]]:
        """The products of a stage, with their names."""
        return list(zip(self._products(kind, stage), self._product_names(stage), strict=True))

    def _product_names(self, stage: Stage) -> list[str]:
        """The names of a stage's products."""
        heads = self.model.kv_heads
        match stage:
            case Scores(block):
                return [f"block.{block}.scores"] * heads
            case WeightedValues(block):
                return [f"block.{block}.values"] * heads
            case Linears(names):
                return list(names)

    def _products(self, kind: PassKind, stage: Stage) -> list[Descriptor]:
        """The products of a stage."""
        heads = range(self.model.kv_heads)
        match stage:
            case Scores(block):
                return [self._scores(block, head) for head in heads]
            case WeightedValues(block):
                return [self._weighted_values(block, head) for head in heads]
            case Linears(("head",)):
                return [self._head(kind)]
            case Linears(names):
                return self._linears(kind, names)

    def _operands(self, kind: PassKind, name: str) -> dict[str, Any]:
        """Fields of a descriptor that multiplies with a linear layer."""
        weights = self.weights[name]
        mode = weights.mode(kind)
        return {
            "mode": mode,
            "k": weights.k,
            "o": weights.drafted if kind is PassKind.DRAFT else weights.o,
            "plane": weights.plane,
            "residual": weights.residual if mode is Mode.VERIFY else 0,
            "groups": weights.groups,
            "activations": self.inputs_of(name, mode),
        }

    def tile_bytes(self, mode: Mode, k: int) -> dict[str, int]:
        """Bytes of a tile of a linear layer's operands in a mode, by the descriptor's fields."""
        engine, beat = self.config.engine, self.config.data.beat_bytes
        column = _WORD * engine.cols
        if mode is Mode.BYPASS:
            return {"plane": k * column}
        groups = round_up(ceil_div(k, engine.format.group) * engine.cols, beat)
        sizes = {"plane": draft_words(k) * column, "groups": groups}
        return sizes | ({"residual": residual_words(k) * column} if mode is Mode.VERIFY else {})

    def inputs_of(self, name: str, mode: Mode) -> int:
        """Address of the activations of a linear layer in a mode."""
        return self.draft_activations if mode is Mode.DRAFT else self.activations

    def _linears(self, kind: PassKind, names: Sequence[str]) -> list[Descriptor]:
        results = self.results_of(names)
        return [
            Descriptor(DescriptorKind.GEMM, **self._operands(kind, name), results=address)
            for name, address in zip(names, results, strict=True)
        ]

    def _head(self, kind: PassKind) -> Descriptor:
        """Only the logits of verify passes are of interest, and only the ranking of the others."""
        operands = self._operands(kind, "head")
        if kind is PassKind.DRAFT:
            return Descriptor(DescriptorKind.ARGMAX, **operands, discard=True, ranking=self.ranking)
        return Descriptor(DescriptorKind.ARGMAX, **operands, results=self.logits)

    def _rerank(self, candidates: int) -> Descriptor:
        operands = self._operands(PassKind.VERIFY, "head")
        del operands["mode"], operands["o"]
        return Descriptor(
            DescriptorKind.RERANK, **operands, candidates=candidates, ranking=self.ranking
        )

    def _scores(self, block: int, head: int) -> Descriptor:
        k = self.model.head_dim
        return Descriptor(
            DescriptorKind.ATTENTION,
            sharing=self.sharing,
            k=k,
            plane=self.keys_address(block, 0, head),
            activations=self.queries + head * self.attention_stride(k),
            results=self.scores + head * self.attention_result_stride(self.capacity),
            stride=self.key_stride,
        )

    def _weighted_values(self, block: int, head: int) -> Descriptor:
        o = self.model.head_dim
        return Descriptor(
            DescriptorKind.ATTENTION,
            values=True,
            sharing=self.sharing,
            o=o,
            plane=self.values_address(block, head),
            activations=self.softmax_weights + head * self.attention_stride(self.capacity),
            results=self.attended + head * self.attention_result_stride(o),
            stride=self.value_stride,
        )


class Excess(NamedTuple):
    """A size of a model that exceeds an accelerator's, and the parameter of `EngineConfig` or of
    `AcceleratorConfig` that is too small, "" if none could be larger."""

    what: str
    size: int
    limit: int
    parameter: str

    def __str__(self) -> str:
        if not self.parameter:
            return f"{self.size} heads share a KV head; at most {self.limit} can"
        if self.parameter == "query_heads":
            return (
                f"the model has {self.size} query heads; the accelerator's query_heads is "
                f"{self.limit}"
            )
        name = self.parameter[-1].upper()
        return f"the {self.what} is {self.size}; the accelerator's largest {name} is {self.limit}"


def exceeded_limits(config: AcceleratorConfig, model: ModelConfig, capacity: int) -> list[Excess]:
    """All sizes of the model, with so many entries of the KV cache, that exceed the
    accelerator's."""
    engine = config.engine
    k_sizes = {
        "hidden size": model.hidden,
        "FFN size": model.ffn_hidden,
        "width of all heads": model.heads * model.head_dim,
        "KV cache": capacity,
    }
    o_sizes = k_sizes | {
        "vocabulary": model.vocab_size,
        "width of all heads": model.heads * round_up(model.head_dim, engine.cols),
    }
    found = [
        Excess(what, size, getattr(engine, name), name)
        for sizes, name in ((k_sizes, "max_k"), (o_sizes, "max_o"))
        for what, size in sizes.items()
        if size > getattr(engine, name)
    ]
    sharing = model.heads // model.kv_heads
    if sharing > _MAX_SHARING:
        found.append(Excess("number of heads that share a KV head", sharing, _MAX_SHARING, ""))
    if model.heads > config.query_heads:
        found.append(
            Excess("number of query heads", model.heads, config.query_heads, "query_heads")
        )
    return found


def weight_planes(
    tensor: EncodedTensor, config: AcceleratorConfig, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draft plane, residual plane and group bytes of an encoded tensor as they lie in memory, its
    outputs in the order of `MemoryLayout.order`."""
    o, cols = tensor.shape[0], config.engine.cols
    planes = [tensor.draft_plane, tensor.residual_plane, tensor.group_bytes]
    if order is None:
        planes = [retile(plane, o, cols) for plane in planes]
    else:
        zeros = encode(torch.zeros(1, tensor.shape[1], dtype=torch.float16), tensor.config, name="")
        padding = (zeros.draft_plane, zeros.residual_plane, zeros.group_bytes)
        planes = [
            tiled(ordered(outputs(plane, o), order, outputs(zero, 1)), cols)
            for plane, zero in zip(planes, padding, strict=True)
        ]
    return planes[0], planes[1], padded_groups(planes[2], config)


def plain_words(
    weight: torch.Tensor, config: AcceleratorConfig, order: np.ndarray | None = None
) -> np.ndarray:
    """Words uint16 of a layer float16 [O, K] that is not encoded as they lie in memory, its outputs
    in the order of `MemoryLayout.order`."""
    words = weight.contiguous().numpy().view(np.uint16)
    if order is not None:
        words = ordered(words, order, np.zeros_like(words[:1]))
    return tiled(words, config.engine.cols)


def ordered(rows: np.ndarray, order: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Rows [n, ...] in the order of `MemoryLayout.order`, with the row `padding` [1, ...] where
    there is none."""
    return np.concatenate((rows, padding))[order]  # -1 is the last one


def encoded_tensor(
    name: str,
    weights: Weights,
    planes: Sequence[np.ndarray],
    config: AcceleratorConfig,
    order: np.ndarray | None = None,
) -> EncodedTensor:
    """The inverse of `weight_planes`: an encoded tensor, tiled for the array, whose draft plane,
    residual plane and group bytes, uint8 [bytes] each, are as they lie in memory."""
    cols = config.engine.cols
    draft, residual = (plane.view("<u2") for plane in planes[:2])
    tiles = ceil_div(weights.o, cols)
    groups = ceil_div(weights.k, config.engine.format.group) * cols
    group_bytes = planes[2].reshape(tiles, -1)[:, :groups].reshape(tiles, -1, cols)
    parts = [draft.reshape(tiles, -1, cols), residual.reshape(tiles, -1, cols), group_bytes]
    o = weights.o
    if order is not None:
        places = np.flatnonzero(order >= 0)
        places = places[np.argsort(order[places])]  # of the model's outputs
        o = len(places)
        parts = [tiled(outputs(part, weights.o)[places], cols) for part in parts]
    return EncodedTensor(
        name,
        (o, weights.k),
        config.engine.format,
        cols,
        *parts,
        drafted_outputs=None if weights.drafted == weights.o else weights.drafted,
    )
