# SPDX-License-Identifier: Apache-2.0
"""Results, rankings and other writes on their way to memory, with pauses and clears."""

from speq.sim import writers_tb


def test_writers() -> None:
    writers_tb.run()
