# SPDX-License-Identifier: Apache-2.0
"""The readers of weights, group bytes and activations against memories, with pauses and faults."""

from speq.sim import readers_tb


def test_readers() -> None:
    readers_tb.run()
