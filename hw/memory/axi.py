# SPDX-License-Identifier: Apache-2.0
"""AXI4 masters: parameters, signatures, and what readers and writers of memory have in common.

The names are those of the AMBA AXI4 specification (ARM IHI 0022).
"""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.engine_config import check_power_of_two, check_range

#: Bits of transaction IDs. All transactions of a reader or writer have one ID, so that responses
#: come in order: 0, or the number of the reader where several share a master (`ReadArbiter`).
ID_BITS = 3
#: Bits of a command's number of beats.
BEATS_BITS = 24
#: Bits of AxLEN, the beats of a burst less one.
LENGTH_BITS = 8
#: AxBURST of bursts with increasing addresses.
BURST_INCR = 0b01
#: AxCACHE: normal, not cached, may be buffered.
CACHE = 0b0011
#: AxPROT: unprivileged, secure, data.
PROTECTION = 0b000

#: No burst may cross a multiple of this many bytes.
PAGE_BYTES = 4096
_ADDRESS_SIGNALS = ("size", "burst", "cache", "prot", "valid", "addr", "len", "ready")
_MIN_DATA_BITS = 64
_MAX_DATA_BITS = 1024
_MIN_ADDRESS_BITS = 16
_MAX_ADDRESS_BITS = 64
_MAX_BURST = 2**LENGTH_BITS
_MAX_OUTSTANDING = 64
_MAX_DEPTH = 2**16


@dataclass(frozen=True)
class AxiConfig:
    """Parameters of an AXI4 master.

    Parameters
    ----------
    data_bits : int
        Bits of a beat: a power of two from 64 to 1024, AXI4's maximum.
    address_bits : int
        Bits of a byte address: 16 to 64.
    burst : int
        Largest number of beats of a burst: a power of two up to 256. Where 4 KiB hold fewer beats,
        those are the limit.
    outstanding : int
        Largest number of bursts without a (last) response: 2 to 64.
    depth : int
        Beats in the buffer of a reader or writer, a power of two that holds a burst. A reader
        sustains one beat per cycle if `depth` and the beats of `outstanding` bursts are at least
        the memory's latency in cycles + `burst` + 8; a writer needs two bursts' depth.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    data_bits: int = 256
    address_bits: int = 40
    burst: int = 16
    outstanding: int = 8
    depth: int = 128

    def __post_init__(self) -> None:
        check_power_of_two("data_bits", self.data_bits, _MIN_DATA_BITS, _MAX_DATA_BITS)
        check_range("address_bits", self.address_bits, _MIN_ADDRESS_BITS, _MAX_ADDRESS_BITS)
        check_power_of_two("burst", self.burst, 1, _MAX_BURST)
        check_range("outstanding", self.outstanding, 2, _MAX_OUTSTANDING)
        check_power_of_two("depth", self.depth, max(2, self.burst_beats), _MAX_DEPTH)

    @property
    def beat_bytes(self) -> int:
        """Bytes of a beat."""
        return self.data_bits // 8

    @property
    def offset_bits(self) -> int:
        """Address bits within a beat, 0 in every address on the bus; also AxSIZE."""
        return self.beat_bytes.bit_length() - 1

    @property
    def word_bits(self) -> int:
        """Bits of an address in beats."""
        return self.address_bits - self.offset_bits

    @property
    def burst_beats(self) -> int:
        """Largest number of beats of a burst on the bus."""
        return min(self.burst, PAGE_BYTES // self.beat_bytes)

    @property
    def command_layout(self) -> data.StructLayout:
        """A transfer of `beats` (1 to 2^24 - 1) from byte address `address` upwards, which must
        be a multiple of `beat_bytes`."""
        return data.StructLayout({"address": self.address_bits, "beats": BEATS_BITS})

    @property
    def read_signature(self) -> wiring.Signature:
        """Address and data channel of a master that reads, as the master sees them."""
        return wiring.Signature(
            self._address_channel("ar")
            | {
                "rid": In(ID_BITS),
                "rdata": In(self.data_bits),
                "rresp": In(2),
                "rlast": In(1),
                "rvalid": In(1),
                "rready": Out(1),
            }
        )

    @property
    def write_signature(self) -> wiring.Signature:
        """Address, data and response channel of a master that writes, as the master sees them."""
        return wiring.Signature(
            self._address_channel("aw")
            | {
                "wdata": Out(self.data_bits),
                "wstrb": Out(self.beat_bytes),
                "wlast": Out(1),
                "wvalid": Out(1),
                "wready": In(1),
                "bid": In(ID_BITS),
                "bresp": In(2),
                "bvalid": In(1),
                "bready": Out(1),
            }
        )

    def _address_channel(self, prefix: str) -> dict[str, wiring.Member]:
        return {
            f"{prefix}id": Out(ID_BITS),
            f"{prefix}addr": Out(self.address_bits),
            f"{prefix}len": Out(LENGTH_BITS),
            f"{prefix}size": Out(3),
            f"{prefix}burst": Out(2),
            f"{prefix}cache": Out(4),
            f"{prefix}prot": Out(3),
            f"{prefix}valid": Out(1),
            f"{prefix}ready": In(1),
        }


def guarded_members(address_bits: int) -> dict[str, wiring.Member]:
    """Members of every unit that reads or writes memory.

    base, limit : In(address_bits)
        First and last byte of the region; to be kept while busy.
    busy : Out(1)
        There are commands or items not taken, or transactions without an answer, or the unit waits
        for `clear` after an error.
    error : Out(Fault)
    error_address : Out(address_bits)
        Of the refused transfer or the burst with the bad response.
    clear : In(1)
        Drop everything; the unit can be used again when it is not busy.
    """
    return {
        "base": In(address_bits),
        "limit": In(address_bits),
        "busy": Out(1),
        "error": Out(Fault),
        "error_address": Out(address_bits),
        "clear": In(1),
    }


def guard(m: Module, outer: wiring.Component, inner: wiring.Component) -> None:
    """Connect the `guarded_members` of a unit with those of the one in it, all but `busy`."""
    m.d.comb += [
        inner.base.eq(outer.base),
        inner.limit.eq(outer.limit),
        inner.clear.eq(outer.clear),
        outer.error.eq(inner.error),
        outer.error_address.eq(inner.error_address),
    ]


class AddressChannel(wiring.Component):
    """Requests of a master on its read or write address channel: a register with a spare one.

    A request is on the bus a cycle after it was taken, one in each cycle unless the bus stalls.
    `requests.ready` comes from a register, so no path leads from the bus through this unit.

    Parameters
    ----------
    config : AxiConfig

    Members
    -------
    requests : In(stream of {word, length})
        Address in beats, and AxLEN.
    valid : Out(1), address : Out(address_bits), length : Out(8), ready : In(1)
        AxVALID, AxADDR, AxLEN, AxREADY.
    """

    def __init__(self, config: AxiConfig) -> None:
        self.config = config
        self._request = data.StructLayout({"word": config.word_bits, "length": LENGTH_BITS})
        super().__init__(
            {
                "requests": In(stream.Signature(self._request)),
                "valid": Out(1),
                "address": Out(config.address_bits),
                "length": Out(LENGTH_BITS),
                "ready": In(1),
            }
        )

    def drive(
        self, m: Module, axi: wiring.PureInterface, prefix: str, response_ready: Signal
    ) -> None:
        """Connect it with the channel "ar" or "aw" of a bus, whose responses are always taken."""
        channel = {name: getattr(axi, f"{prefix}{name}") for name in _ADDRESS_SIGNALS}
        m.d.comb += [
            channel["size"].eq(self.config.offset_bits),
            channel["burst"].eq(BURST_INCR),
            channel["cache"].eq(CACHE),
            channel["prot"].eq(PROTECTION),
            response_ready.eq(1),
            channel["valid"].eq(self.valid),
            channel["addr"].eq(self.address),
            channel["len"].eq(self.length),
            self.ready.eq(channel["ready"]),
        ]

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        offered = Signal(self._request, reset_less=True)
        spare = Signal(self._request, reset_less=True)
        has_spare = Signal()
        take = self.requests.valid & self.requests.ready
        free = ~self.valid | self.ready  # what is offered may change
        m.d.comb += [
            self.requests.ready.eq(~has_spare),
            self.address.eq(Cat(Const(0, self.config.offset_bits), offered.word)),
            self.length.eq(offered.length),
        ]
        with m.If(free):
            m.d.sync += [
                offered.eq(Mux(has_spare, spare, self.requests.payload)),
                self.valid.eq(has_spare | take),
                has_spare.eq(0),
            ]
        with m.Elif(take):
            m.d.sync += [spare.eq(self.requests.payload), has_spare.eq(1)]
        return m


class Fault(enum.Enum, shape=unsigned(2)):
    """Why a reader or writer of memory stopped."""

    NONE = 0
    #: A command was malformed or left the region; it never reached the bus.
    REFUSED = 1
    #: The response SLVERR, under its code on the bus.
    SLAVE = 2
    #: The response DECERR, under its code on the bus.
    DECODE = 3


class FaultState(wiring.Component):
    """The fault of the oldest command of a reader or writer, and when it may go on.

    A bad response stops the unit in the next cycle, a refused command does not: what came before
    it is finished. `clear` forgets the fault and stops the unit for as long as transactions are
    outstanding. A bad response takes the place of a refused command, which is a later one.

    Parameters
    ----------
    config : AxiConfig

    Members
    -------
    refused : In(1)
    refused_address : In(address_bits)
    response_valid : In(1)
    response : In(2)
        xRESP of the response.
    response_address : In(address_bits)
        Address of the burst that it belongs to.
    drained : In(1)
        No transaction is outstanding.
    clear : In(1)
    error : Out(Fault)
        Sticky, until `clear`.
    error_address : Out(address_bits)
        Of the refused command or the failed burst; undefined while there is no error.
    stopped : Out(1)
        Nothing new may start, responses are to be thrown away.
    restart : Out(1)
        The last cycle in which it is stopped.
    """

    def __init__(self, config: AxiConfig) -> None:
        self.config = config
        super().__init__(
            {
                "refused": In(1),
                "refused_address": In(config.address_bits),
                "response_valid": In(1),
                "response": In(2),
                "response_address": In(config.address_bits),
                "drained": In(1),
                "clear": In(1),
                "error": Out(Fault),
                "error_address": Out(config.address_bits),
                "stopped": Out(1),
                "restart": Out(1),
            }
        )

    def supervise(
        self,
        m: Module,
        unit: wiring.Component,
        splitter: wiring.Component,
        *,
        valid: Value,
        response: Value,
        word: Value,
        outstanding: Value,
    ) -> None:
        """Connect it with a reader or writer and its BurstSplitter: `valid` and `response` of the
        bus, the address in beats of the burst that it answers, and the number of bursts
        outstanding."""
        m.d.comb += [
            splitter.base.eq(unit.base),
            splitter.limit.eq(unit.limit),
            splitter.hold.eq(self.error != Fault.NONE),
            splitter.clear.eq(unit.clear | self.stopped),
            self.refused.eq(splitter.refused),
            self.refused_address.eq(splitter.refused_address),
            self.response_valid.eq(valid),
            self.response.eq(response),
            self.response_address.eq(Cat(Const(0, self.config.offset_bits), word)),
            self.drained.eq(outstanding == 0),
            self.clear.eq(unit.clear),
            unit.error.eq(self.error),
            unit.error_address.eq(self.error_address),
        ]

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        no_error = self.error == Fault.NONE
        m.d.comb += self.restart.eq(self.stopped & self.drained & no_error & ~self.clear)
        with m.If(no_error & self.refused):
            m.d.sync += [self.error.eq(Fault.REFUSED), self.error_address.eq(self.refused_address)]
        # The upper bit tells SLVERR and DECERR from OKAY and EXOKAY.
        with m.If(self.response_valid & self.response[1] & ~self.stopped):
            m.d.sync += self.stopped.eq(1)
            with m.If(no_error | (self.error == Fault.REFUSED)):
                m.d.sync += [
                    self.error.eq(self.response),
                    self.error_address.eq(self.response_address),
                ]
        with m.If(self.restart):
            m.d.sync += self.stopped.eq(0)
        with m.If(self.clear):
            m.d.sync += [self.error.eq(Fault.NONE), self.stopped.eq(1)]
        return m
