# SPDX-License-Identifier: Apache-2.0
"""The tiles of a layer that hold the best outputs of a ranking."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.engine_config import DRAFT_LANES, FP16_BITS

_WORD_BYTES = FP16_BITS // 8


def layer_layout(config: AcceleratorConfig) -> data.StructLayout:
    """An encoded layer in memory: weights of an output, addresses of its planes and group bytes."""
    address = config.address_bits
    return data.StructLayout(
        {"k": config.engine.k_bits, "plane": address, "residual": address, "groups": address}
    )


def candidate_tile_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A tile of a layer: its number, the columns that are candidates, where it lies, and whether it
    is not the first."""
    address = config.address_bits
    return data.StructLayout(
        {
            "tile": config.tile_number_bits,
            "columns": config.engine.cols,
            "keep": 1,
            "plane": address,
            "residual": address,
            "groups": address,
        }
    )


class CandidateTiles(wiring.Component):
    """From the best entries of a ranking, the different tiles that hold them, by rising number.

    The first `candidates` entries that are valid are looked at one after the other, once for each
    tile: the lowest tile behind the one before is the next. Its place in memory, its number times
    the size of a tile, is added up bit by bit.

    Flow control: `tiles` may stall. A start is taken unless busy; `entries` and `candidates` are
    read with it, `layer` has to be kept until `busy` falls. A tile is offered `config.choices` + 2
    cycles and one for each bit of its number behind the start or the tile before.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    start : In(1)
    candidates : In(8)
    entries : In(config.ranking_layout)
    layer : In(layer_layout(config))
    tiles : Out(stream of candidate_tile_layout(config))
    busy : Out(1)
        From the cycle after a start until the one in which nothing is left.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "candidates": In(8),
                "entries": In(config.ranking_layout),
                "layer": In(layer_layout(config)),
                "tiles": Out(stream.Signature(candidate_tile_layout(config))),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config, layer = self.config, self.layer
        column_bits = (config.engine.cols - 1).bit_length()
        rotating = Signal(config.ranking_layout, reset_less=True)
        head = rotating[0]
        head_tile, head_column = head.token[column_bits:], head.token[:column_bits]
        found = Signal(candidate_tile_layout(config), reset_less=True)
        is_found = Signal()
        before = Signal.like(found.tile, reset_less=True)  # the tile before, if `keep`
        index = Signal(range(config.choices))
        # What a bit of the tile's number, from the lowest on, adds to each address.
        left = Signal.like(found.tile, reset_less=True)
        names = ("plane", "residual", "groups")
        steps = {
            name: Signal(config.address_bits, name=f"{name}_step", reset_less=True)
            for name in names
        }
        m.d.comb += [self.busy.eq(1), self.tiles.payload.eq(found)]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.busy.eq(0)
                with m.If(self.start):
                    m.d.sync += [rotating.eq(self.entries), found.keep.eq(0)]
                    for i, (kept, entry) in enumerate(zip(rotating, self.entries, strict=True)):
                        m.d.sync += kept.valid.eq(entry.valid & (i < self.candidates))
                    m.next = "SCAN"
            with m.State("SCAN"):
                is_new = head.valid & (~found.keep | (head_tile > before))
                with m.If(is_new & (~is_found | (head_tile < found.tile))):
                    m.d.sync += [
                        is_found.eq(1),
                        found.tile.eq(head_tile),
                        found.columns.eq(1 << head_column),
                    ]
                with m.Elif(is_new & (head_tile == found.tile)):
                    m.d.sync += found.columns.eq(found.columns | (1 << head_column))
                m.d.sync += index.eq(index + 1)
                for i in range(config.choices):
                    m.d.sync += rotating[i].eq(rotating[(i + 1) % config.choices])
                with m.If(index == config.choices - 1):
                    m.next = "FOUND"
            with m.State("FOUND"):
                m.d.sync += [is_found.eq(0), left.eq(found.tile)]
                for name, size in self._tile_sizes().items():
                    m.d.sync += [found[name].eq(layer[name]), steps[name].eq(size)]
                m.next = "IDLE"
                with m.If(is_found):
                    m.next = "LOCATE"
            with m.State("LOCATE"):
                m.d.sync += left.eq(left >> 1)
                for name in names:
                    m.d.sync += steps[name].eq(steps[name] << 1)
                    with m.If(left[0]):
                        m.d.sync += found[name].eq(found[name] + steps[name])
                with m.If(left == 0):
                    m.next = "OFFER"
            with m.State("OFFER"):
                m.d.comb += self.tiles.valid.eq(1)
                with m.If(self.tiles.ready):
                    m.d.sync += [found.keep.eq(1), before.eq(found.tile)]
                    m.next = "SCAN"
        return m

    def _tile_sizes(self) -> dict[str, Value]:
        """Bytes of a tile in both planes and of its group bytes."""
        engine, port = self.config.engine, self.config.data
        k = self.layer.k
        plane = ceil_div(k, DRAFT_LANES) * (engine.cols * _WORD_BYTES)
        beats = ceil_div(ceil_div(k, engine.format.group) * engine.cols, port.beat_bytes)
        return {
            "plane": plane,
            # Times `RESIDUAL_WORDS`, 3, by an adder, which is faster than a multiplier.
            "residual": (plane << 1) + plane,
            "groups": beats << port.offset_bits,
        }
