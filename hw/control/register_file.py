# SPDX-License-Identifier: Apache-2.0
"""The registers of `speq.hw.control.register_map` on an AXI4-Lite port."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ShapeLike, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.register_map import ADDRESS_BITS, Register, constants, registers

_WORD_BITS = 32
_WORD_BYTES = _WORD_BITS // 8
#: Address bits within a word.
_OFFSET_BITS = 2
#: Words of a block, of which a read chooses one in each cycle, are 2 to this power.
_BLOCK_BITS = 5


def lite_signature() -> wiring.Signature:
    """An AXI4-Lite port of 32 bits as the master sees it."""
    return wiring.Signature(
        {
            "awaddr": Out(ADDRESS_BITS),
            "awprot": Out(3),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata": Out(_WORD_BITS),
            "wstrb": Out(_WORD_BYTES),
            "wvalid": Out(1),
            "wready": In(1),
            "bresp": In(2),
            "bvalid": In(1),
            "bready": Out(1),
            "araddr": Out(ADDRESS_BITS),
            "arprot": Out(3),
            "arvalid": Out(1),
            "arready": In(1),
            "rdata": In(_WORD_BITS),
            "rresp": In(2),
            "rvalid": In(1),
            "rready": Out(1),
        }
    )


def register_shape(register: Register) -> ShapeLike:
    """Shape of a register inside the RTL: a number, or a layout of its fields; arrays of these."""
    shape = register.bits
    if register.fields:
        fields = {field.name: data.Field(field.bits, field.low) for field in register.fields}
        shape = data.FlexibleLayout(register.bits, fields)
    return data.ArrayLayout(shape, register.count) if register.count else shape


def values_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What the host has written: all "rw" registers."""
    return data.StructLayout(
        {each.key: register_shape(each) for each in registers(config) if each.access == "rw"}
    )


def status_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What the host can read of the hardware: "ro" registers that can change, "w1c" registers."""
    fixed = constants(config)
    return data.StructLayout(
        {
            each.key: register_shape(each)
            for each in registers(config)
            if each.access in ("ro", "w1c") and each.name not in fixed
        }
    )


class RegisterFile(wiring.Component):
    """AXI4-Lite slave with the registers of a configuration.

    All responses are OKAY. What is not a register reads as 0 and ignores writes, and so do bits
    beyond a register's. The lowest two address bits are ignored. Bytes without strobe keep their
    value; a pulse `.._write` comes with 0 in them, and only if a byte in use is written. Writes to
    registers that a run depends on (`Register.locked`) have no effect while `locked` is set.

    Flow control: a write takes effect once its address and its data have come, in either order, and
    is answered in the next cycle; a read is answered `READ_LATENCY` cycles after its address. There
    is one write and one read at a time, independent of each other. No ready or valid output depends
    on an input of the same cycle.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    bus : In(lite_signature())
    values : Out(values_layout(config))
        A member per "rw" register, under its lower-case name; from the cycle after the write.
    status : In(status_layout(config))
        A member per register that the hardware determines.
    locked : In(1)
        A run is under way.
    write_data : Out(32)
        What is written, in a cycle with a `.._write`.
    `<name>`_write : Out(1)
        Of each "wo" and "w1c" register: pulse, it is being written.
    `<name>`_update : In(1)
        Of each register that the hardware changes as well (POSITION, ROOT, HISTORY_LENGTH): take
        the new value. It takes precedence over a write in the same cycle.
    `<name>`_value : In(bits)
    """

    #: Cycles from a read's address to its answer.
    READ_LATENCY = 3

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._registers = registers(config)
        members = {
            "bus": In(lite_signature()),
            "values": Out(values_layout(config)),
            "status": In(status_layout(config)),
            "locked": In(1),
            "write_data": Out(_WORD_BITS),
        }
        for each in self._registers:
            if each.access in ("wo", "w1c"):
                members[f"{each.key}_write"] = Out(1)
            if each.updated:
                members[f"{each.key}_update"] = In(1)
                members[f"{each.key}_value"] = In(each.bits)
        super().__init__(members)

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        self._write(m)
        self._read(m)
        return m

    def _write(self, m: Module) -> None:
        """Collect an address and data, write, answer."""
        bus = self.bus
        has_address = Signal()
        has_data = Signal()
        address = Signal(ADDRESS_BITS - _OFFSET_BITS, reset_less=True)
        word = Signal(_WORD_BITS, reset_less=True)
        strobe = Signal(_WORD_BYTES, reset_less=True)
        write = Signal()
        m.d.comb += [
            bus.awready.eq(~has_address),
            bus.wready.eq(~has_data),
            write.eq(has_address & has_data & ~bus.bvalid),
            self.write_data.eq(Cat(Mux(strobe[i], _byte(word, i), 0) for i in range(_WORD_BYTES))),
        ]
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [has_address.eq(1), address.eq(bus.awaddr[_OFFSET_BITS:])]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [has_data.eq(1), word.eq(bus.wdata), strobe.eq(bus.wstrb)]
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        with m.If(write):
            m.d.sync += [has_address.eq(0), has_data.eq(0), bus.bvalid.eq(1)]

        with m.Switch(address):
            for register in self._registers:
                for i, offset in enumerate(register.offsets):
                    if register.access != "ro":
                        with m.Case(offset >> _OFFSET_BITS):
                            self._write_word(m, register, i, write, strobe)
        for register in self._registers:
            if register.updated:
                with m.If(getattr(self, f"{register.key}_update")):
                    m.d.sync += self.values[register.key].eq(getattr(self, f"{register.key}_value"))

    def _write_word(
        self, m: Module, register: Register, i: int, write: Signal, strobe: Signal
    ) -> None:
        """Write word `i` of a register if `write` is set."""
        element, word = divmod(i, register.words)
        low = _WORD_BITS * word
        bits = min(register.bits - low, _WORD_BITS)
        if register.access == "rw":
            values = self.values[register.key]
            stored = Value.cast(values[element] if register.count else values)[low : low + bits]
            takes = write & ~self.locked if register.locked else write
            for byte in range(-(-bits // 8)):
                part = _byte(stored, byte)
                with m.If(takes & strobe[byte]):
                    m.d.sync += part.eq(_byte(self.write_data, byte))
        else:
            in_use = strobe[: -(-bits // 8)].any()
            m.d.comb += getattr(self, f"{register.key}_write").eq(write & in_use)

    def _read(self, m: Module) -> None:
        """Take an address, answer with what the register holds in the next cycle."""
        bus = self.bus
        has_address = Signal()
        is_chosen = Signal()
        address = Signal(ADDRESS_BITS - _OFFSET_BITS, reset_less=True)
        m.d.comb += bus.arready.eq(~has_address & ~is_chosen & ~bus.rvalid)
        # First by the lower bits of the address, in each of the blocks of so many words, then by
        # the upper ones.
        place, number = address[:_BLOCK_BITS], address[_BLOCK_BITS:]
        blocks: dict[int, dict[int, Value]] = {}
        for offset, word in self._readable():
            block, low = divmod(offset >> _OFFSET_BITS, 1 << _BLOCK_BITS)
            blocks.setdefault(block, {})[low] = word
        chosen = {}
        for block, words in blocks.items():
            chosen[block] = Signal(_WORD_BITS, name=f"block_{block}", reset_less=True)
            m.d.sync += chosen[block].eq(0)
            with m.Switch(place):
                for low, word in words.items():
                    with m.Case(low):
                        m.d.sync += chosen[block].eq(word)
        with m.If(bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        m.d.sync += is_chosen.eq(has_address)
        with m.If(is_chosen):
            m.d.sync += [bus.rvalid.eq(1), bus.rdata.eq(0)]
            with m.Switch(number):
                for block, word in chosen.items():
                    with m.Case(block):
                        m.d.sync += bus.rdata.eq(word)
        with m.If(has_address):
            m.d.sync += has_address.eq(0)
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [has_address.eq(1), address.eq(bus.araddr[_OFFSET_BITS:])]

    def _readable(self) -> list[tuple[int, Value]]:
        """Offset and content of all words that can be read."""
        words = []
        fixed = constants(self.config)
        for register in self._registers:
            if register.access == "wo":
                continue
            if register.name in fixed:
                content = Const(register.pack(fixed[register.name]), register.bits)
            else:
                source = self.values if register.access == "rw" else self.status
                content = source[register.key]
            elements = list(content) if register.count else [content]
            parts = [
                Value.cast(element)[low : low + _WORD_BITS]
                for element in elements
                for low in range(0, register.bits, _WORD_BITS)
            ]
            words += zip(register.offsets, parts, strict=True)
        return words


def _byte(word: Value, index: int) -> Value:
    """Byte `index` of a value, or what there is of it."""
    return word[8 * index : 8 * index + 8]
