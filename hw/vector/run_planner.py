# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a tile go in memory, if each of its elements is a line of rows there."""

from __future__ import annotations

from amaranth.hdl import Const, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.descriptor import Target
from speq.hw.engine_config import FP16_BITS
from speq.hw.vector.command import shape_layout

_FP16_BYTES = FP16_BITS // 8
#: Tiles that wait for being planned: as many as a `Transposer` holds.
_TILES = 2


def line_places(config: AcceleratorConfig) -> int:
    """Places of a line, for FP16 numbers of as many rows: the smallest power of two that is at
    least R."""
    return 1 << (config.engine.rows - 1).bit_length()


def writer_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What a vector operation leaves in memory, and where. The members are those of a VECTOR
    descriptor (`speq.hw.control.descriptor.Target`) and its pass; `sweep` is what the results go
    through, and `k`, of SOFTMAX, too, the number of elements of a row that are written."""
    engine, address = config.engine, config.address_bits
    return data.StructLayout(
        {
            "target": Target,
            "sweep": shape_layout(config),
            "k": engine.k_bits,
            "results": address,
            "outer": address,
            "inner": address,
            "rows": engine.token_bits,
            "position": engine.k_bits,
            "sharing": 8,
        }
    )


def tile_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A tile of `rows` rows, the last of its segment, the last of all."""
    return data.StructLayout(
        {"rows": config.engine.token_bits, "ends_segment": 1, "ends_operation": 1}
    )


def run_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Rows of a tile that go to the same lines.

    The place p of a line holds row p - `shift` modulo `line_places`, if it is marked in `places`.
    The first of `lines` lines is at byte address `address`, element i of the tile in line i. Lines
    are 2 C bytes apart with `keys`, else `AcceleratorConfig.activation_bytes`.
    """
    places = line_places(config)
    return data.StructLayout(
        {
            "shift": max(1, (places - 1).bit_length()),
            "places": places,
            "address": config.address_bits,
            "lines": config.engine.cols.bit_length(),
            "keys": 1,
            "ends_tile": 1,
            "ends_operation": 1,
        }
    )


class RunPlanner(wiring.Component):
    """Cut the rows of each tile into runs that go to the same lines, and find their addresses.

    All targets of `speq.hw.control.descriptor.Target` but TILES and VALUES. QUERIES are cut where
    a batch of an ATTENTION ends, CONTEXT where a query head does, and KEYS where their place in a
    line of the KV cache is a multiple of `line_places`.

    Flow control: both streams may stall in any cycle; two tiles are taken before the runs of the
    first have been. A tile takes one cycle and three for each run. The first run of a command takes
    as many cycles more as its position's tile of the KV cache has bits.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    start : In(1)
        A command begins; all runs of the one before have been taken.
    command : In(writer_command_layout(config))
        From `start` on until the last run was taken.
    tiles : In(stream of tile_layout(config))
        Not before the cycle after `start`.
    runs : Out(stream of run_layout(config))
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "command": In(writer_command_layout(config)),
                "tiles": In(stream.Signature(tile_layout(config))),
                "runs": Out(stream.Signature(run_layout(config))),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config, command = self.config, self.command
        engine, places = config.engine, line_places(config)
        cols_bits = engine.cols.bit_length() - 1
        place_bits = places.bit_length() - 1
        keys_tile = _FP16_BYTES * engine.cols**2  # bytes of a tile's lines in the cache
        target = command.target
        keys, queries = target == Target.KEYS, target == Target.QUERIES
        context, weights = target == Target.CONTEXT, target == Target.WEIGHTS

        layout = tile_layout(config)
        m.submodules.tiles = tiles = SyncFIFO(width=layout.size, depth=_TILES)
        tile = data.View(layout, tiles.r_data)
        m.d.comb += [
            tiles.w_data.eq(self.tiles.payload),
            tiles.w_en.eq(self.tiles.valid),
            self.tiles.ready.eq(tiles.w_rdy),
        ]

        # Where the next row goes: `place` of a line, in a piece of `places` places of the lines
        # at `base`.
        where = data.StructLayout(
            {
                "base": config.address_bits,
                "piece": max(1, cols_bits - place_bits),
                "place": max(1, place_bits),
            }
        )
        here = Signal(where, reset_less=True)
        head = Signal(where, reset_less=True)  # of the segment's first row
        offset = Signal(config.address_bits, reset_less=True)  # of the tile's lines
        segment = Signal(config.address_bits, reset_less=True)
        left = Signal(engine.k_bits, reset_less=True)  # elements of the segment
        heads = Signal(8, reset_less=True)  # query heads that are left of the KV head
        address = Signal(config.address_bits, reset_less=True)
        lines = Signal(engine.cols.bit_length(), reset_less=True)
        row = Signal(max(1, place_bits), reset_less=True)
        rows = Signal(engine.token_bits, reset_less=True)  # of the tile that are left
        limit = Signal(places.bit_length(), reset_less=True)  # places between cuts
        room = Signal(places.bit_length(), reset_less=True)
        count = Signal(places.bit_length(), reset_less=True)
        cuts = Signal(reset_less=True)
        # Tiles of the KV cache before the position, and the distance that its lowest bit means.
        before = Signal(max(1, engine.k_bits - cols_bits), reset_less=True)
        distance = Signal(config.address_bits, reset_less=True)

        run = self.runs.payload
        end = here.place + count
        every = Const(-1, places)
        is_last_run = rows == count
        step = Mux(context, command.outer, command.inner)
        first_place = Mux(keys, command.position[:place_bits], 0)
        first_piece = Mux(keys, command.position[place_bits:cols_bits], 0)
        m.d.comb += [
            run.shift.eq((here.place - row)[:place_bits]),
            run.places.eq((every << here.place) & ~(every << end)),
            run.address.eq(address),
            run.lines.eq(lines),
            run.keys.eq(keys),
            run.ends_tile.eq(is_last_run),
            run.ends_operation.eq(is_last_run & tile.ends_operation),
        ]
        measure = [room.eq(limit - here.place), address.eq(here.base + offset)]
        with m.FSM():
            with m.State("IDLE"), m.If(self.start):
                m.d.sync += [
                    segment.eq(command.results),
                    before.eq(Mux(keys, command.position[cols_bits:], 0)),
                    distance.eq(command.inner),
                    offset.eq(0),
                    left.eq(command.k),
                    heads.eq(command.sharing),
                    limit.eq(Mux(context, command.rows, Mux(queries, engine.rows, places))),
                ]
                m.next = "LOCATE"
            with m.State("LOCATE"):
                m.d.sync += [before.eq(before >> 1), distance.eq(distance << 1)]
                for each in (here, head):
                    m.d.sync += [
                        each.base.eq(segment),
                        each.piece.eq(first_piece),
                        each.place.eq(first_place),
                    ]
                with m.If(before[0]):
                    m.d.sync += segment.eq(segment + distance)
                with m.If(before == 0):
                    m.next = "TILE"
            with m.State("TILE"):
                m.d.sync += [
                    *measure,
                    row.eq(0),
                    rows.eq(tile.rows),
                    lines.eq(Mux(left > engine.cols, engine.cols, left)),
                ]
                with m.If(tiles.r_rdy):
                    m.next = "COUNT"
            with m.State("ROWS"):
                m.d.sync += measure
                m.next = "COUNT"
            with m.State("COUNT"):
                m.d.sync += [
                    cuts.eq(rows >= room),
                    count.eq(Mux(rows >= room, room, rows)),
                    address.eq(
                        address + (here.piece << (place_bits + _FP16_BYTES.bit_length() - 1))
                    ),
                ]
                m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += self.runs.valid.eq(1)
                with m.If(self.runs.ready):
                    m.d.sync += [
                        row.eq(row + count),
                        rows.eq(rows - count),
                        here.place.eq(Mux(cuts, 0, end)),
                    ]
                    with m.If(cuts & keys):
                        m.d.sync += here.piece.eq(here.piece + 1)
                    with m.If(cuts & (~keys | (here.piece == engine.cols // places - 1))):
                        m.d.sync += [here.base.eq(here.base + step), here.piece.eq(0)]
                    m.next = "ROWS"
                    with m.If(is_last_run):
                        m.next = "END"
            with m.State("END"):
                m.d.comb += tiles.r_en.eq(1)
                m.next = "TILE"
                with m.If(~tile.ends_segment):
                    a_tile = Mux(keys, keys_tile, engine.cols * config.activation_bytes)
                    m.d.sync += [
                        here.eq(head),
                        offset.eq(offset + a_tile),
                        left.eq(left - engine.cols),
                    ]
                with m.Else():
                    m.d.sync += [offset.eq(0), left.eq(command.k), heads.eq(heads - 1)]
                    with m.If(context | (queries & (heads != 1))):
                        m.d.sync += head.eq(here)
                    with m.Else():
                        following = segment + Mux(weights, command.inner, command.outer)
                        m.d.sync += [segment.eq(following), heads.eq(command.sharing)]
                        for each in (here, head):
                            m.d.sync += [
                                each.base.eq(following),
                                each.piece.eq(first_piece),
                                each.place.eq(first_place),
                            ]
                with m.If(tile.ends_operation):
                    m.next = "IDLE"
        return m
