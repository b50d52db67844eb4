# SPDX-License-Identifier: Apache-2.0
"""Cycles of programs on the accelerator's RTL, counted and predicted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from speq.host.cycles import PredictedPasses
from speq.host.program_meter import ProgramMeter
from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.descriptor import DescriptorKind, VectorOperation
from speq.hw.engine_config import EngineConfig
from speq.model.checkpoint import Model
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.speculation import Settings
from speq.sim.session import simulated_session
from tests.host.decoding import SEED, check
from tests.model.drafted import drafted_model
from tests.sim.configurations import FEW, FULL, NARROW

LATENCY = 16
#: Largest relative error of predicted cycles.
TOLERANCE = 0.02


def session_for(model: Model, config: AcceleratorConfig = FEW, capacity: int = 48) -> Session:
    """A session on the accelerator in the simulator."""
    encoded = encode_linears(model)
    return simulated_session(model, encoded, config, capacity=capacity, latency=LATENCY)


@pytest.fixture(scope="module")
def llama() -> Iterator[Session]:
    with session_for(drafted_model("llama", SEED)) as session:
        yield session


def test_what_descriptors_add_and_take_alone(llama):
    """What they add is what a pass takes; among others one takes less than alone. What decodes next
    finds everything as it was."""
    layout, registers = llama.driver.layout, llama.driver.registers
    meter = ProgramMeter(llama.board, layout)
    *program, _ = layout.program(PassKind.VERIFY)
    ends = meter.prefixes(program[:6], 3, 5)
    assert ends == sorted(ends) and ends[0] < ends[1]
    assert registers["CYCLES"] == ends[-1] and registers["HOST_CYCLES"] == 0
    norm = next(
        d
        for d in program
        if d.kind is DescriptorKind.VECTOR and d.operation is VectorOperation.NORM
    )
    alone = meter.alone(norm, 3, 5)
    assert 0 < meter.repeated(norm, 3, 5) < alone
    counted = meter.counters([norm], 3, 5)
    assert 0 < counted["VECTOR_STALLS"] < counted["VECTOR_CYCLES"] <= alone
    with pytest.raises(ValueError, match="there is room for"):
        meter.cycles(2 * program, 3, 5)
    check(llama, [1, 2, 3], Settings(4, 2), max_tokens=3)


def check_predictions(session: Session, position: int) -> None:
    """Every kind of pass behind so many entries, and the plain one over encoded weights."""
    layout, config = session.driver.layout, session.driver.config
    formats = {name: tensor.config for name, tensor in session.encoded.items()}
    predicted = PredictedPasses(config, session.model.config, formats, LATENCY)
    meter = ProgramMeter(session.board, layout)
    empty = meter.cycles([], 1, position)
    rows = config.engine.rows
    kinds = [(PassKind.DRAFT, 1), (PassKind.SINGLE, rows)]
    kinds += [(PassKind.VERIFY, n) for n in (1, rows // 2 + 1, rows)]
    print()
    for kind, n in kinds:
        counted = meter.cycles(layout.program(kind)[:-1], n, position) - empty
        expected = predicted.walk(kind, n, position) - predicted.walk(None, n, position)
        print(f"{kind.name:6} {n} rows {counted:9,} {expected:9,} {expected / counted - 1:+.2%}")
        assert expected == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("qwen3", {"heads": 4, "kv_heads": 2}), ("gemma3", {"head_dim": 10})],
    ids=["llama", "norms of heads", "GELU, heads that do not fill their tiles"],
)
def test_cycles_of_passes_are_predicted(architecture, changes):
    with session_for(drafted_model(architecture, SEED, **changes)) as session:
        for position in (0, 37):
            check_predictions(session, position)


def test_the_array_waits_for_a_narrow_port():
    """Which takes two cycles for a word of all columns."""
    model = drafted_model("llama", SEED, hidden=64, ffn_hidden=160)
    with session_for(model, NARROW) as session:
        check_predictions(session, 9)


@pytest.mark.slow
def test_cycles_of_passes_of_tiny_are_predicted():
    with session_for(load_model("tiny"), FULL, capacity=300) as session:
        for position in (0, 96, 256):
            check_predictions(session, position)


@pytest.mark.slow
def test_cycles_of_passes_of_a_block_of_smollm2_are_predicted():
    dimensions = {"hidden": 576, "ffn_hidden": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}
    model = drafted_model("llama", SEED, blocks=1, vocab_size=512, context=1100, **dimensions)
    config = AcceleratorConfig(EngineConfig(rows=8, cols=32))
    with session_for(model, config, capacity=1100) as session:
        for position in (96, 1024):
            check_predictions(session, position)
