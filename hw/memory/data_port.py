# SPDX-License-Identifier: Apache-2.0
"""All that reads and writes through one AXI4 port, with the scratch memory beside it."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.memory.axi import AxiConfig
from speq.hw.memory.read_arbiter import ReadArbiter
from speq.hw.memory.read_router import ReadRouter
from speq.hw.memory.scratch_memory import ScratchMemory
from speq.hw.memory.write_router import WriteRouter


class DataPort(wiring.Component):
    """Several readers and a writer on a port to memory and, in a window of addresses, on scratch
    memory.

    To its masters both are one memory: responses come in the order of each one's requests, and a
    read that follows the response to a write gives what was written. Memory behind the window is
    neither read nor written. While one reader gets a beat from memory, another may get one from
    scratch memory. Without scratch memory the writer is connected with the port, and the readers
    are through a `ReadArbiter`.

    Parameters
    ----------
    config : AxiConfig
        Of the port. Each master has at most `outstanding` bursts without an answer.
    readers : int
        1 to 8.
    size : int
        Bytes of the scratch memory and of the window, a power of two from 4,096 on; 0: none.

    Members
    -------
    base : In(address_bits)
        Of the window, a multiple of 4,096, to be kept while bursts are under way; 0: there is no
        window. Not there without scratch memory.
    readers : In(config.read_signature).array(readers)
        Each with one ID, and always ready for read data.
    writer : In(config.write_signature)
        With one ID. No burst of any of them crosses a multiple of 4,096.
    read : Out(config.read_signature)
    write : Out(config.write_signature)
    """

    #: Cycles from a request of a reader to the port, and to the first beat from scratch memory, if
    #: no other is there.
    LATENCY = ReadRouter.LATENCY + ReadArbiter.LATENCY
    SCRATCH_LATENCY = LATENCY + ScratchMemory.READ_LATENCY

    def __init__(self, config: AxiConfig, readers: int, size: int) -> None:
        self.config = config
        self.size = size
        self.number = readers
        super().__init__(
            {
                "readers": In(config.read_signature).array(readers),
                "writer": In(config.write_signature),
                "read": Out(config.read_signature),
                "write": Out(config.write_signature),
            }
            | ({"base": In(config.address_bits)} if size else {})
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        readers = [wiring.flipped(self.readers[i]) for i in range(self.number)]
        writer = wiring.flipped(self.writer)
        if self.size:
            writer = self._add_scratch(m, readers, writer)
        m.submodules.arbiter = arbiter = ReadArbiter(self.config, self.number)
        for i, reader in enumerate(readers):
            wiring.connect(m, reader, arbiter.ports[i])
        wiring.connect(m, arbiter.axi, wiring.flipped(self.read))
        wiring.connect(m, writer, wiring.flipped(self.write))
        return m

    def _add_scratch(
        self, m: Module, readers: list[wiring.PureInterface], writer: wiring.PureInterface
    ) -> wiring.PureInterface:
        """Put scratch memory beside memory; `readers` become those of memory, whose writer is
        returned."""
        scratch_memory, read_router, write_router = self._parts()
        m.submodules.scratch = scratch = scratch_memory(self.config, self.size)
        m.submodules.scratch_arbiter = arbiter = ReadArbiter(self.config, self.number)
        wiring.connect(m, arbiter.axi, scratch.read)
        for i, reader in enumerate(readers):
            m.submodules[f"read_router_{i}"] = router = read_router(self.config, self.size)
            m.d.comb += router.base.eq(self.base)
            wiring.connect(m, reader, router.master)
            wiring.connect(m, router.scratch, arbiter.ports[i])
            readers[i] = router.memory
        m.submodules.write_router = router = write_router(self.config, self.size)
        m.d.comb += router.base.eq(self.base)
        wiring.connect(m, writer, router.master)
        wiring.connect(m, router.scratch, scratch.write)
        return router.memory

    def _parts(self) -> tuple[type[ScratchMemory], type[ReadRouter], type[WriteRouter]]:
        """What scratch memory and the ways to it are."""
        return ScratchMemory, ReadRouter, WriteRouter
