# SPDX-License-Identifier: Apache-2.0
"""What every test run says first, and how many threads it has."""

import os

from speq.sim.runner import seed

# Workers of pytest-xdist share the cores. With more threads than cores, torch's threads wait for
# one another by spinning: small operations then take ten times as long. This is before torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header() -> str:
    return f"SPEQ_SEED={seed()} (set the environment variable for other random tests)"
