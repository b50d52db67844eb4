# SPDX-License-Identifier: Apache-2.0
"""The register file against an AXI4-Lite master."""

from speq.sim.benches import registers


def test_register_file() -> None:
    registers.run()
