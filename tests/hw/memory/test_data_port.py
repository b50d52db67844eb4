# SPDX-License-Identifier: Apache-2.0
"""The data port with scratch memory."""

from __future__ import annotations

from speq.sim.benches import data_port


def test_data_port() -> None:
    data_port.run()
