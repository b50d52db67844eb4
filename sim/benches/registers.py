# SPDX-License-Identifier: Apache-2.0
"""Testbench of the register file: cocotbext-axi's AXI4-Lite master against the register map.

The golden model is a few lines of Python on the map. In all tests a monitor checks that offers on
the response channels stay, that responses are OKAY, and which write pulses come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster
from cocotbext.axi.axil_channels import AxiLiteAWTransaction, AxiLiteWTransaction

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.register_file import RegisterFile, status_layout, values_layout
from speq.hw.control.register_map import ADDRESS_BITS, Register, constants, registers
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog import convert_unit
from speq.sim.benches.axi import Channel
from speq.sim.benches.world import Ports, SideBySide, World, pauses
from speq.sim.runner import seed, simulate

_TOP = "registers_tb"
_WIDE = AxiConfig(data_bits=1024, address_bits=64)
#: Those under test: usual, smallest and largest.
_CONFIGS = (
    AcceleratorConfig(),
    AcceleratorConfig(EngineConfig(rows=1, cols=4, max_k=1, max_o=1), history=0, lanes=0),
    AcceleratorConfig(
        EngineConfig(rows=64, cols=256, draft_rows=64, max_k=2**16, max_o=2**24), _WIDE, _WIDE
    ),
)
_OPERATIONS = 500
_PAUSE = 0.5
_SPACE = 1 << ADDRESS_BITS


def run() -> None:
    """Check register files of several configurations."""
    units = {f"file_{i}": RegisterFile(config) for i, config in enumerate(_CONFIGS)}
    simulate(convert_unit(SideBySide(units), _TOP), _TOP, __name__)


class _World(World):
    """The design under test, its golden model and what is around it."""

    master: AxiLiteMaster  # from the start on

    def __init__(self, dut: Any, index: int) -> None:
        self.config = _CONFIGS[index]
        super().__init__(dut, f"unit RegisterFile, {self.config}", np.random.default_rng(seed()))
        self.ports = Ports(dut, f"file_{index}")
        self.places = {
            offset: (register, i)
            for register in registers(self.config)
            for i, offset in enumerate(register.offsets)
        }
        self.stored = {each.key: 0 for each in registers(self.config) if each.access == "rw"}
        self.status = 0
        self.locked = False
        self.pulse_keys = [
            each.key for each in registers(self.config) if each.access in ("wo", "w1c")
        ]
        self.pulses: list[tuple[str, int]] = []
        self.expected_pulses: list[tuple[str, int]] = []

    @classmethod
    async def start(cls, dut: Any, index: int, pause: float = 0.0) -> _World:
        """After a reset, with a master that pauses all channels at random."""
        world = cls(dut, index)
        world.start_clock()
        for each in registers(world.config):
            if each.updated:
                world.ports[f"{each.key}_update"].value = 0
        bus = AxiLiteBus.from_prefix(dut, f"{world.ports.unit}__bus_")
        world.master = AxiLiteMaster(bus, dut.clk, dut.rst)
        write, read = world.master.write_if, world.master.read_if
        for channel in (write.aw_channel, write.w_channel, write.b_channel):
            channel.set_pause_generator(pauses(world.rng, pause))
        for channel in (read.ar_channel, read.r_channel):
            channel.set_pause_generator(pauses(world.rng, pause))
        world.lock(False)
        world.change_status()
        await world.reset()
        cocotb.start_soon(world.watch())
        return world

    def connect(self) -> list[Callable[[int], None]]:
        self.responses = (
            Channel(self.ports, "bus__b", ("resp",)),
            Channel(self.ports, "bus__r", ("resp", "data")),
        )
        return [self._record_pulses, self._check_responses]

    def change_status(self) -> None:
        """Give everything that the hardware determines a new value."""
        size = status_layout(self.config).size
        self.status = int.from_bytes(self.rng.bytes(-(-size // 8)), "little") % (1 << size)
        self.ports["status"].value = self.status

    def lock(self, locked: bool) -> None:
        """Whether a run is under way."""
        self.locked = locked
        self.ports["locked"].value = locked

    async def watch(self) -> None:
        """Let the agents look at each cycle."""
        while True:
            await self.step()

    def _record_pulses(self, cycle: int) -> None:
        for key in self.pulse_keys:
            if self.ports.get(f"{key}_write"):
                self.pulses.append((key, self.ports.get("write_data")))

    def _check_responses(self, cycle: int) -> None:
        for channel in self.responses:
            offer, _ = channel.sample(cycle)
            assert offer is None or offer["resp"] == 0, (
                f"{channel.name}: cycle {cycle}: response expected 0x0, got {offer['resp']:#x}"
            )

    def content(self, register: Register) -> int:
        """All words of a register as one number."""
        fixed = constants(self.config)
        if register.access == "wo":
            return 0
        if register.name in fixed:
            return register.pack(fixed[register.name])
        if register.access == "rw":
            bits = self.stored[register.key]
        else:
            place = status_layout(self.config)[register.key]
            bits = self.status >> place.offset & (1 << place.width) - 1
        return sum(
            (bits >> register.bits * i & (1 << register.bits) - 1) << 32 * register.words * i
            for i in range(max(1, register.count))
        )

    def word(self, offset: int) -> int:
        """What a read of the word at an offset gives."""
        if offset not in self.places:
            return 0
        register, i = self.places[offset]
        return self.content(register) >> 32 * i & 0xFFFFFFFF

    def apply(self, address: int, content: bytes) -> None:
        """A write of bytes within one word."""
        if address & ~3 not in self.places:
            return
        register, i = self.places[address & ~3]
        if self.locked and register.access == "rw" and register.name != "IRQ_ENABLE":
            return
        low = 8 * (address & 3)
        mask = (1 << 8 * len(content)) - 1 << low
        word = int.from_bytes(content, "little") << low
        if register.access == "rw":
            element, part = divmod(i, register.words)
            place = register.bits * element + 32 * part
            mask &= (1 << register.bits - 32 * part) - 1
            kept = self.stored[register.key] & ~(mask << place)
            self.stored[register.key] = kept | (word & mask) << place
        elif register.access != "ro" and low < register.bits:
            self.expected_pulses.append((register.key, word))

    async def write(self, address: int, content: bytes) -> None:
        """Write bytes within one word, and check what follows."""
        await self.master.write(address, content)
        self.apply(address, content)
        self.check_inside(f"cycle {self.cycle}: {content.hex()} to {address:#x}")

    async def read(self, address: int, size: int) -> None:
        """Read bytes within one word, and check them."""
        got = (await self.master.read(address, size)).data
        expected = self.word(address & ~3).to_bytes(4, "little")[address & 3 :][:size]
        assert got == expected, (
            f"unit RegisterFile, cycle {self.cycle}: {size} bytes at {address:#x}: "
            f"expected 0x{expected[::-1].hex()}, got 0x{got[::-1].hex()}"
        )

    def check_inside(self, what: str) -> None:
        """Compare the values and the pulses towards the hardware."""
        layout = values_layout(self.config)
        values = self.ports.get("values")
        for key, expected in self.stored.items():
            got = values >> layout[key].offset & (1 << layout[key].width) - 1
            assert got == expected, f"{what}: {key}: expected {expected:#x}, got {got:#x}"
        assert self.pulses == self.expected_pulses, what

    def random_place(self) -> tuple[int, int]:
        """Address and number of bytes within a word, mostly of a register."""
        offsets = list(self.places)
        if self.rng.random() < 0.9:
            base = offsets[int(self.rng.integers(len(offsets)))]
        else:
            base = 4 * int(self.rng.integers(_SPACE // 4))
        if self.rng.random() < 0.6:
            return base, 4
        first = int(self.rng.integers(4))
        return base + first, int(self.rng.integers(1, 5 - first))


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def everything_after_reset(dut: Any, index: int) -> None:
    """Every word of the whole space: constants, status, zero elsewhere."""
    world = await _World.start(dut, index)
    for offset in range(0, _SPACE, 4):
        await world.read(offset, 4)
    world.check_inside("after reset")


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=(0.0, _PAUSE))
async def every_register(dut: Any, index: int, pause: float) -> None:
    """Ones and zeros to every word, in every access kind; then each is read."""
    world = await _World.start(dut, index, pause)
    for pattern in (b"\xff" * 4, b"\0" * 4, b"\x5a\xa5\x3c\xc3"):
        for offset in world.places:
            await world.write(offset, pattern)
        world.change_status()
        for offset in world.places:
            await world.read(offset, 4)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=(0.0, _PAUSE))
async def random_accesses(dut: Any, index: int, pause: float) -> None:
    """Any bytes of any word, in any order."""
    world = await _World.start(dut, index, pause)
    for _ in range(_OPERATIONS):
        address, size = world.random_place()
        if world.rng.random() < 0.5:
            await world.write(address, world.rng.bytes(size))
        else:
            await world.read(address, size)
        if world.rng.random() < 0.1:
            world.change_status()
            world.lock(bool(world.rng.random() < 0.3))
    assert world.pulses, "no pulse was seen"


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def registers_of_a_run(dut: Any, index: int) -> None:
    """While a run is under way writes change nothing but the interrupts that are enabled."""
    world = await _World.start(dut, index)
    for locked, pattern in ((False, b"\x5a" * 4), (True, b"\xa5" * 4), (False, b"\xff" * 4)):
        world.lock(locked)
        for offset in world.places:
            await world.write(offset, pattern)
            await world.read(offset, 4)


@cocotb.test()
@cocotb.parametrize(address_first=(False, True))
async def every_strobe_in_either_order(dut: Any, address_first: bool) -> None:
    """Address and data come far apart; any bytes are written, also with gaps between them."""
    world = await _World.start(dut, 0)
    offsets = {each.name: each.offset for each in registers(world.config)}
    channels = world.master.write_if
    for name in ("THRESHOLD", "HOST_ANSWER"):
        for strobe in range(16):
            word = int(world.rng.integers(1 << 32))
            sends = [
                channels.aw_channel.send(AxiLiteAWTransaction(awaddr=offsets[name])),
                channels.w_channel.send(AxiLiteWTransaction(wdata=word, wstrb=strobe)),
            ]
            for send in sends if address_first else reversed(sends):
                world.check_inside("half a write")
                await send
                for _ in range(5):
                    await RisingEdge(dut.clk)
            await channels.b_channel.recv()
            mask = sum(0xFF << 8 * i for i in range(4) if strobe >> i & 1)
            if name == "THRESHOLD":
                world.stored["threshold"] = world.stored["threshold"] & ~mask | word & mask
            elif strobe & 1:
                world.expected_pulses.append(("host_answer", word & mask))
            world.check_inside(f"{name} with strobe {strobe:04b}")


@cocotb.test()
async def hardware_updates(dut: Any) -> None:
    """The hardware changes some registers, and takes precedence over the host."""
    world = await _World.start(dut, 0)
    offsets = {each.name: each.offset for each in registers(world.config)}
    bits = {each.name: each.bits for each in registers(world.config) if each.updated}
    assert bits == {"POSITION": 17, "ROOT": 24, "HISTORY_LENGTH": 17}
    for name, size in bits.items():
        key = name.lower()
        for held in (False, True):
            await world.write(offsets[name], world.rng.bytes(4))
            value = int(world.rng.integers(1 << size))
            world.ports[f"{key}_value"].value = value
            world.ports[f"{key}_update"].value = 1
            await RisingEdge(dut.clk)
            if held:
                # An update in each cycle, so also in that of the host's write.
                await world.master.write(offsets[name], bytes(4))
            world.ports[f"{key}_update"].value = 0
            await RisingEdge(dut.clk)
            world.stored[key] = value
            world.check_inside(f"an update of {name}")
            await world.read(offsets[name], 4)
            await world.write(offsets[name], world.rng.bytes(4))


@cocotb.test()
async def reset_in_a_write(dut: Any) -> None:
    """A reset between address and data forgets the address, and all that was written."""
    world = await _World.start(dut, 0)
    for offset in world.places:
        await world.write(offset, b"\xff" * 4)
    await world.master.write_if.aw_channel.send(AxiLiteAWTransaction(awaddr=0))
    for _ in range(5):
        await RisingEdge(dut.clk)
    dut.rst.value = 1
    await RisingEdge(dut.clk)
    dut.rst.value = 0
    world.stored = dict.fromkeys(world.stored, 0)
    await RisingEdge(dut.clk)
    world.check_inside("after reset")
    for offset in world.places:
        await world.read(offset, 4)
    for offset in world.places:
        await world.write(offset, b"\x5a" * 4)
