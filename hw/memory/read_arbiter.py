# SPDX-License-Identifier: Apache-2.0
"""Several readers of memory on one AXI4 master port."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.memory.axi import ID_BITS, AxiConfig

_REQUEST = ("araddr", "arlen", "arsize", "arburst", "arcache", "arprot")
_RESPONSE = ("rdata", "rresp", "rlast")


class ReadArbiter(wiring.Component):
    """Merge the read channels of `ports` masters, round robin.

    Requests of port i get the ID i, whatever ID they have; read data go to the port that their ID
    names, with ID 0, in the cycle in which they come. So beats of different ports may be
    interleaved and bursts of different ports may overtake one another; those of one port keep their
    order.

    Flow control: one request per cycle, in the bus's next cycle (`LATENCY`), where it stays until
    it is taken. A port that is not ready for read data blocks the others; `MemoryReader` always is.

    Parameters
    ----------
    config : AxiConfig
    ports : int
        1 to 8, as many as there are IDs.

    Members
    -------
    ports : In(config.read_signature).array(ports)
    axi : Out(config.read_signature)

    Raises
    ------
    ValueError
        If there are not enough IDs.
    """

    #: Cycles from a request on a port to the bus.
    LATENCY = 1

    def __init__(self, config: AxiConfig, ports: int) -> None:
        if not 1 <= ports <= 1 << ID_BITS:
            raise ValueError(f"ports is {ports!r}; allowed are 1 to {1 << ID_BITS}")
        self.config = config
        self.number = ports
        super().__init__(
            {
                "ports": In(config.read_signature).array(ports),
                "axi": Out(config.read_signature),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        axi = self.axi
        ports = [self.ports[i] for i in range(self.number)]

        granted = Signal(ID_BITS)
        previous = Signal(ID_BITS)
        for i in range(self.number):
            with m.If(previous == i):
                # The port behind the previous one comes last here, so it wins.
                for j in reversed([(i + 1 + n) % self.number for n in range(self.number)]):
                    with m.If(ports[j].arvalid):
                        m.d.comb += granted.eq(j)
        free = ~axi.arvalid | axi.arready
        with m.If(axi.arready):
            m.d.sync += axi.arvalid.eq(0)
        for i, port in enumerate(ports):
            m.d.comb += port.arready.eq(free & (granted == i))
            with m.If(port.arvalid & port.arready):
                m.d.sync += [axi.arvalid.eq(1), axi.arid.eq(i), previous.eq(i)]
                m.d.sync += [getattr(axi, name).eq(getattr(port, name)) for name in _REQUEST]

        for i, port in enumerate(ports):
            m.d.comb += [getattr(port, name).eq(getattr(axi, name)) for name in _RESPONSE]
            m.d.comb += port.rvalid.eq(axi.rvalid & (axi.rid == i))
        ready = Cat(port.rready & (axi.rid == i) for i, port in enumerate(ports))
        m.d.comb += axi.rready.eq(ready.any())
        return m
