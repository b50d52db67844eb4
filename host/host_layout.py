# SPDX-License-Identifier: Apache-2.0
"""Memory and programs of an accelerator without a vector unit: HOST descriptors, before each stage,
ask the host for the work between the products."""

from __future__ import annotations

from speq.host.layout import (
    RING_LOG2,
    Kind,
    MemoryLayout,
    Region,
    activation_count,
    ranking_bytes,
)
from speq.hw.accelerator_config import PassKind
from speq.hw.control.descriptor import DESCRIPTOR_BYTES, Descriptor, DescriptorKind
from speq.model.schedule import Linears, Scores, Stage, WeightedValues, ends_with_vector_work

_ARGUMENT_KIND = 24  # first bit of the pass kind in a HOST descriptor's argument


def host_argument(kind: PassKind, index: int) -> int:
    """Argument of HOST descriptor number `index` of a program."""
    return kind.value << _ARGUMENT_KIND | index


class HostLayout(MemoryLayout):
    """A layout whose programs leave vector work to the host.

    Operands of one stage of a pass are overwritten by those of the next, results as well. What
    follows `read` is `write`.
    """

    def _place_buffers(self) -> None:
        config, model = self.config, self.model
        self._take_cache()
        self.activations = self._take(
            Kind.ACTIVATIONS,
            max(
                activation_count(self._longest, config) * config.activation_bytes,
                model.kv_heads * self.attention_stride(self.capacity),
                model.kv_heads * self.attention_stride(model.head_dim),
            ),
        )
        self.queries = self.softmax_weights = self.activations
        self._take_draft_activations()
        self._take_programs()
        self.read = Region(self._base, self._end)
        self.ranking = self._take(Kind.RANKING, config.engine.rows * ranking_bytes(config))
        self.ring = self._take(Kind.RING, 4 << RING_LOG2)
        self.results = self._take(
            Kind.RESULTS, max(map(self._results_size, self.stages(PassKind.VERIFY)))
        )
        self.scores = self.attended = self.results
        self.write = Region(self.read.stop, self._end)

    def host_turns(self, kind: PassKind) -> int:
        """Before each stage, because its operands depend on the results before it, and behind the
        last one if something is left."""
        return len(self.stages(kind)) + ends_with_vector_work(self.schedule(kind))

    def _named_program(self, kind: PassKind, reranked: int) -> list[tuple[Descriptor, str]]:
        stages = self.stages(kind)
        program: list[tuple[Descriptor, str]] = []
        for index in range(self.host_turns(kind)):
            argument = host_argument(kind, index)
            program.append((Descriptor(DescriptorKind.HOST, argument=argument), ""))
            if index < len(stages):
                program += self.products(kind, stages[index])
        return self._ended(program, kind, reranked)

    def _program_size(self, kind: PassKind) -> int:
        products = (
            len(stage.names) if isinstance(stage, Linears) else self.model.kv_heads
            for stage in self.stages(kind)
        )
        length = self.host_turns(kind) + sum(products) + 1 + (kind is PassKind.DRAFT)
        return DESCRIPTOR_BYTES * length

    def _results_size(self, stage: Stage) -> int:
        """Bytes of all results of a stage, for as many tokens as the array has rows."""
        model = self.model
        match stage:
            case Scores():
                return model.kv_heads * self.attention_result_stride(self.capacity)
            case WeightedValues():
                return model.kv_heads * self.attention_result_stride(model.head_dim)
            case Linears(names):
                return sum(map(self._result_size, names))
