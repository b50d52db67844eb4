# SPDX-License-Identifier: Apache-2.0
"""What every test run says first."""

from speq.sim.runner import seed


def pytest_report_header() -> str:
    return f"SPEQ_SEED={seed()} (set the environment variable for other random tests)"
