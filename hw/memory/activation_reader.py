# SPDX-License-Identifier: Apache-2.0
"""The array's activations, from memory."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.engine_config import DRAFT_LANES, Mode
from speq.hw.memory.axi import guarded_members
from speq.hw.memory.tile_reader import TileReader, forward


def activation_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The activations of a GEMM of reduction dimension `k` (1 or more), from byte address `address`
    on."""
    return data.StructLayout(
        {"mode": Mode, "k": config.engine.k_bits, "address": config.address_bits}
    )


class ActivationReader(wiring.Component):
    """For each command, k words of the activation store (draft: ceil(k / 4)).

    In memory a word has `config.activation_bytes`.

    Flow control, rate, faults and `clear`: as of `TileReader`.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    axi : Out(config.data.read_signature)
    command : In(stream of activation_command_layout(config))
    activations : Out(stream of config.engine.activation_layout)
    and `guarded_members(address_bits)`
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "axi": Out(config.data.read_signature),
                "command": In(stream.Signature(activation_command_layout(config))),
                "activations": Out(stream.Signature(config.engine.activation_layout)),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        k_bits = self.config.engine.k_bits
        m.submodules.reader = reader = TileReader(
            self.config.data, 8 * self.config.activation_bytes, k_bits, tile_bits=1
        )
        forward(m, self, reader, self.activations)
        command, tile = self.command.payload, reader.command.payload
        draft_words = ceil_div(command.k, DRAFT_LANES)
        m.d.comb += [
            tile.address.eq(command.address),
            tile.words.eq(Mux(command.mode == Mode.DRAFT, draft_words, command.k)),
            tile.tiles.eq(1),
        ]
        return m
