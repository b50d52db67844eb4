# SPDX-License-Identifier: Apache-2.0
"""What of a model's memory is on chip."""

from __future__ import annotations

from dataclasses import replace

import pytest

from speq.host.layout import Kind
from speq.host.programs import ModelLayout
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from tests.model.drafted import drafted_model

#: Nothing that a host reads or that a run leaves for the next one.
LEFT_FOR_LATER = {
    Kind.STREAM, Kind.TEMPORARY, Kind.ACTIVATIONS, Kind.DRAFT_ACTIVATIONS, Kind.QUERIES,
    Kind.ATTENDED, Kind.RESULTS, Kind.SOFTMAX_WEIGHTS, Kind.SCORES,
}  # fmt: skip
SMOLLM2 = {"hidden": 576, "ffn_hidden": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "granite"])
@pytest.mark.parametrize("size", [0, 4096, 1 << 19])
def test_only_what_a_pass_leaves_for_later_is_on_chip(architecture: str, size: int) -> None:
    """In a window that begins at a page, behind any load address; the first of it, if not all."""
    config = AcceleratorConfig(EngineConfig(rows=4, cols=8), scratch=size)
    model = drafted_model(architecture, 0).config
    for base in (0, 5 * config.load_alignment):
        layout = ModelLayout(config, model, [], 40, base)
        window = layout.scratch
        assert window.stop - window.start == size and window.start % 4096 == 0
        inside = [
            p for p in layout.parts if p.start < window.stop and p.start + p.size > window.start
        ]
        assert {part.kind for part in inside} <= LEFT_FOR_LATER
        assert not size or inside[0].start == window.start == layout.stream
        if size > 4096:
            assert {part.kind for part in layout.parts[-len(inside) :]} == set(
                part.kind for part in layout.parts if part.kind in LEFT_FOR_LATER
            )
        assert layout.write.start <= window.start <= window.stop <= layout.write.stop or not size


@pytest.mark.parametrize("cols", [16, 32, 64])
def test_the_default_holds_what_smollm2_leaves_for_later(cols: int) -> None:
    """Up to 768 entries of the KV cache; with more the last scores are in memory."""
    config = AcceleratorConfig(EngineConfig(rows=8, cols=cols))
    model = replace(drafted_model("llama", 0, blocks=1, **SMOLLM2).config, context=4096)
    for capacity, fits in ((768, True), (832, False)):
        layout = ModelLayout(config, model, [], capacity)
        *_, last = layout.parts
        assert last.kind is Kind.SCORES
        assert (last.start + last.size <= layout.scratch.stop) == fits
        assert last.start < layout.scratch.stop
