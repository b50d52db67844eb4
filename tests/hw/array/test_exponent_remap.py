# SPDX-License-Identifier: Apache-2.0
"""The exponent-remap unit against the number format."""

from speq.sim.benches import exponent_remap


def test_every_word_and_base() -> None:
    exponent_remap.run()
