# SPDX-License-Identifier: Apache-2.0
"""The memory reader and writer against memories, with pauses, faults and resets."""

from speq.sim import memory_tb


def test_readers_and_writers() -> None:
    memory_tb.run()


def test_expected_bursts() -> None:
    config = memory_tb.AxiConfig(data_bits=64, burst=16)
    commands = [(0x10F0, 20), (0x2000, 16), (0x3FF8, 1)]
    assert memory_tb.expected_bursts(config, commands) == [
        (0x10F0, 2),
        (0x1100, 16),
        (0x1180, 2),
        (0x2000, 16),
        (0x3FF8, 1),
    ]
