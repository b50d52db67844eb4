# SPDX-License-Identifier: Apache-2.0
"""What every test run says first, how many threads it has and what comes last."""

import gc
import os
from pathlib import Path

import pytest

from speq.sim.runner import seed

# Workers of pytest-xdist share the cores. With more threads than cores, torch's threads wait for
# one another by spinning: small operations then take ten times as long. This is before torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Generating Verilog makes millions of objects. Looking for cycles among them after every 700, as is
# the default, takes a quarter of the time.
gc.set_threshold(100_000)


def pytest_report_header() -> str:
    return f"SPEQ_SEED={seed()} (set the environment variable for other random tests)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest simulations come first, and the tests of the model, which are many short files,
    come last, the long ones among them first: no worker is left with a long file when the others
    have nothing to do."""
    tests = Path(__file__).parent
    model, sim = tests / "model", tests / "sim"
    first = (sim / "test_accelerator.py", sim / "test_decoding.py")
    long = (model / "test_emulation.py", model / "test_speculation.py")
    items.sort(
        key=lambda item: (
            item.path not in first,
            item.path.is_relative_to(model),
            item.path not in long,
        )
    )
