# SPDX-License-Identifier: Apache-2.0
"""Memory of an accelerator with a vector unit: all that a pass needs, so that no host takes part.

Heads begin at a tile: where their size is no multiple of C, there are outputs of the q, k and v
projections between them that are padding. Elements of queries and keys have *rotary order*, in
which the two of a rotary pair are neighbours: element 2i of a head in memory is the model's element
i, element 2i + 1 its element i + D/2.
"""

from __future__ import annotations

import numpy as np

from speq.host.layout import (
    RING_LOG2,
    Kind,
    MemoryLayout,
    Region,
    activation_count,
    ceil_div,
    ranking_bytes,
    results_bytes,
    round_up,
)
from speq.hw.accelerator_config import PassKind
from speq.hw.engine_config import DRAFT_LANES, Mode
from speq.model.checkpoint import tensor_shapes
from speq.model.schedule import Linears
from speq.model.vector_ops import rotary_order

#: Channel vectors that are no weights of the model: ones [H]; for each query head 1 for its
#: elements and 0 for its padding; and the constant that GELU adds [F].
ONES, HEAD_MASK, GELU_LINEAR = "ones", "head_mask", "gelu_linear"

_HALF, _SINGLE = 2, 4  # bytes of an FP16 and of an FP32 number
_TOKEN = 4  # bytes of a token id


class ModelPlaces(MemoryLayout):
    """All of a layout whose programs do all vector work, but for the programs.

    The accelerator reads all of it, and writes what does not hold something before the first run.

    Attributes
    ----------
    embedding : int
        Table of FP16 rows by token, each with `embedding_pitch` bytes, 0 beyond the hidden size.
    rotary : dict
        Address of the table of a rotary base, by the name of its part, "global" or "local": FP32
        rows by position, `rotary_pitch` bytes each: cosine and sine of each pair.
    channels : dict
        Address of FP32 [head][tile][C] by name of a norm's weight or a bias, of one of all outputs
        or of heads, in their order, or of a constant.
    text : int
        Token of each position, uint32 [capacity]. The host writes those of single passes.
    stream : int
        The residual stream, FP32 tiles.
    temporary : int
        FP32 tiles of a product of vectors, if a pass has one.
    gated, draft_gated : int
        Activations of down projections, FP16 and block activations.
    scratch : Region
        The window of the scratch memory, which holds nothing from pass to pass and nothing that a
        host reads; empty if there is none.
    """

    scratch: Region = Region(0, 0)
    stream: int = 0
    temporary: int = 0
    gated: int = 0
    draft_gated: int = 0

    def _place_buffers(self) -> None:
        config, model = self.config, self.model
        context = self.sharing * model.head_dim * config.activation_bytes
        if model.kv_heads > 1 and context % config.data.beat_bytes:
            raise ValueError(
                f"the outputs of a KV head's attention have {context} bytes, which are no whole "
                f"beats of the data port ({config.data.beat_bytes}): it needs a narrower one"
            )
        self.embedding = self._take(Kind.EMBEDDING, model.vocab_size * self.embedding_pitch)
        names = ("global",) if model.local_rope_base is None else ("global", "local")
        self.rotary = {
            name: self._take(Kind.ROTARY, self.capacity * self.rotary_pitch, name) for name in names
        }
        self.channels = {
            name: self._take(Kind.CHANNELS, _SINGLE * heads * self._width(size), name)
            for name, (heads, size) in self.channel_sizes().items()
        }
        self.text = self._take(Kind.TEXT, _TOKEN * self.capacity)
        self._take_programs()
        unwritten = self._end
        self._take_cache()
        # What the host reads.
        self.ranking = self._take(Kind.RANKING, config.engine.rows * self.ranking_pitch)
        self.ring = self._take(Kind.RING, 4 << RING_LOG2)
        self.logits = self._take(Kind.LOGITS, self._result_size("head"))
        self._place_intermediates()
        self.read = Region(self._base, self._end)
        self.write = Region(unwritten, self._end)

    def _place_intermediates(self) -> None:
        """Take the bytes of what a pass leaves for later in the same pass, in the order in which
        it gains from being on chip: the first of them are in the window of the scratch memory, and
        of one that is there in part the beginning, which is all that a short context uses."""
        config, model = self.config, self.model
        if config.scratch:
            self._end = self._base + round_up(self._end - self._base, config.load_alignment)
            self.scratch = Region(self._end, self._end + config.scratch)
        self.stream = self._take(Kind.STREAM, self._tiles_bytes(model.hidden))
        words = activation_count(self._longest, config) * config.activation_bytes
        self.activations = self._take(Kind.ACTIVATIONS, words)
        # What the gate leaves while other tiles of its operands are multiplied from the others.
        words, draft_words = (
            activation_count(count, config) * config.activation_bytes
            for count in (model.ffn_hidden, ceil_div(model.ffn_hidden, DRAFT_LANES))
        )
        self.gated = self._take(Kind.ACTIVATIONS, words, "gated")
        self._take_draft_activations()
        self.draft_gated = self._take(Kind.DRAFT_ACTIVATIONS, draft_words, "gated")
        heads, size = model.kv_heads, model.head_dim
        self.queries = self._take(Kind.QUERIES, heads * self.attention_stride(size))
        self.attended = self._take(Kind.ATTENDED, heads * self.attention_result_stride(size))
        if model.activation == "gelu_tanh" or model.logit_scale != 1.0:
            longest = max(model.hidden, model.ffn_hidden)
            self.temporary = self._take(Kind.TEMPORARY, self._tiles_bytes(longest))
        linears = (s.names for s in self.stages(PassKind.VERIFY) if isinstance(s, Linears))
        self.results = self._take(
            Kind.RESULTS,
            max(sum(map(self._result_size, names)) for names in linears if names != ("head",)),
        )
        self.softmax_weights = self._take(
            Kind.SOFTMAX_WEIGHTS, heads * self.attention_stride(self.capacity)
        )
        self.scores = self._take(Kind.SCORES, heads * self.attention_result_stride(self.capacity))
        # Nothing else may be in the window.
        self._end = max(self._end, self.scratch.stop)

    @property
    def _longest(self) -> int:
        """The largest K of a linear layer whose activations are not `gated`."""
        return max(each.k for name, each in self.weights.items() if not name.endswith("down_proj"))

    def inputs_of(self, name: str, mode: Mode) -> int:
        if not name.endswith("down_proj"):
            return super().inputs_of(name, mode)
        return self.draft_gated if mode is Mode.DRAFT else self.gated

    def _width(self, size: int) -> int:
        """Elements of the tiles of so many."""
        return round_up(size, self.config.engine.cols)

    def _tiles_bytes(self, size: int) -> int:
        """Bytes of FP32 tiles of so many elements, for as many rows as the array has."""
        return results_bytes(self.config.engine.rows, size, self.config.engine.cols)

    @property
    def embedding_pitch(self) -> int:
        """Bytes from a row of the embedding table to the next."""
        return _HALF * self._width(self.model.hidden)

    @property
    def rotary_pitch(self) -> int:
        """Bytes from a row of a rotary table to the next."""
        return _SINGLE * self._width(self.model.head_dim)

    @property
    def ranking_pitch(self) -> int:
        """Bytes from the ranking of a draft pass of a chain to the next."""
        return round_up(ranking_bytes(self.config), self.config.data.beat_bytes)

    def draft_ranking(self, index: int) -> int:
        return self.ranking + index * self.ranking_pitch

    def heads_of(self, name: str) -> int:
        """Heads that the outputs of a linear layer are, 0 if they are none."""
        model, layer = self.model, name.rpartition(".")[2]
        return {"q_proj": model.heads, "k_proj": model.kv_heads, "v_proj": model.kv_heads}.get(
            layer, 0
        )

    def _stored_outputs(self, name: str, o: int) -> int:
        return self.heads_of(name) * self._width(self.model.head_dim) or o

    def order(self, name: str) -> np.ndarray | None:
        if not self.heads_of(name):
            return None
        size = self.model.head_dim
        order = np.full((self.heads_of(name), self._width(size)), -1)
        elements = np.arange(size) if name.endswith("v_proj") else rotary_order(size)
        order[:, :size] = size * np.arange(len(order))[:, None] + elements
        return order.reshape(-1)

    def channel_sizes(self) -> dict[str, tuple[int, int]]:
        """Heads, 1 where there are none, and elements of each, of the channel vectors by name."""
        model = self.model
        sizes: dict[str, tuple[int, int]] = {}
        for name, shape in tensor_shapes(model):
            if name.endswith("q_norm"):
                sizes[name] = (model.heads, model.head_dim)
            elif name.endswith("k_norm"):
                sizes[name] = (model.kv_heads, model.head_dim)
            elif name.endswith(".bias") and (heads := self.heads_of(name.removesuffix(".bias"))):
                sizes[name] = (heads, model.head_dim)
            elif name.endswith((".bias", "norm")):
                sizes[name] = (1, shape[0])
        if model.logit_scale != 1.0:
            sizes[ONES] = (1, model.hidden)
        if model.head_norms and model.head_dim % self.config.engine.cols:
            sizes[HEAD_MASK] = (model.heads, model.head_dim)
        if model.activation == "gelu_tanh":
            sizes[GELU_LINEAR] = (1, model.ffn_hidden)
        return sizes
