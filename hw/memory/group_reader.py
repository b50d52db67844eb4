# SPDX-License-Identifier: Apache-2.0
"""The group bytes of the array's weights, from memory."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.memory.axi import guarded_members
from speq.hw.memory.tile_reader import TileReader, forward
from speq.hw.memory.weight_reader import tile_bits


def group_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The group bytes of a GEMM: `tiles` tiles for `k` weights per column, both 1 or more, from
    byte address `groups` on."""
    return data.StructLayout(
        {
            "k": config.engine.k_bits,
            "tiles": tile_bits(config),
            "groups": config.address_bits,
        }
    )


class GroupReader(wiring.Component):
    """For each command, ceil(k / group) words of a byte per column for each of its tiles.

    In memory the bytes are [tile][group][column], each tile padded to a whole beat.

    Flow control, rate, faults and `clear`: as of `TileReader`.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    axi : Out(config.data.read_signature)
    command : In(stream of group_command_layout(config))
    groups : Out(stream of config.engine.group_layout)
    and `guarded_members(address_bits)`
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "axi": Out(config.data.read_signature),
                "command": In(stream.Signature(group_command_layout(config))),
                "groups": Out(stream.Signature(config.engine.group_layout)),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        engine = self.config.engine
        group = engine.format.group
        m.submodules.reader = reader = TileReader(
            self.config.data,
            engine.group_layout.size,
            engine.k_bits,
            tile_bits(self.config),
        )
        forward(m, self, reader, self.groups)
        command, tile = self.command.payload, reader.command.payload
        m.d.comb += [
            tile.address.eq(command.groups),
            tile.words.eq(ceil_div(command.k, group)),
            tile.tiles.eq(command.tiles),
        ]
        return m
