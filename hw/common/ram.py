# SPDX-License-Identifier: Apache-2.0
"""The one memory primitive of the design, the place to put an SRAM macro."""

from __future__ import annotations

from amaranth.hdl import ClockSignal, Elaboratable, Instance
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

#: Verilog of the primitive. Every flow infers block RAM from it; an ASIC flow replaces it.
RAM_VERILOG = """\
module speq_ram #(parameter WIDTH = 1, parameter DEPTH = 1, parameter ADDRESS = 1) (
  input clk,
  input write_enable,
  input [ADDRESS-1:0] write_address,
  input [WIDTH-1:0] write_data,
  input read_enable,
  input [ADDRESS-1:0] read_address,
  output reg [WIDTH-1:0] read_data
);
  reg [WIDTH-1:0] memory [0:DEPTH-1];
  always @(posedge clk) begin
    if (write_enable) memory[write_address] <= write_data;
    if (read_enable) read_data <= memory[read_address];
  end
endmodule
"""


class Ram(wiring.Component):
    """Memory with one write and one read port.

    A read takes one cycle and keeps its value until the next read; a read of the address that is
    being written gives the old value. Contents are undefined until written.

    Parameters
    ----------
    width, depth : int
        Bits of a word, and words.

    Members
    -------
    write_enable : In(1)
    write_address : In(range(depth))
    write_data : In(width)
    read_enable : In(1)
    read_address : In(range(depth))
    read_data : Out(width)
    """

    def __init__(self, width: int, depth: int) -> None:
        self.width = width
        self.depth = depth
        super().__init__(
            {
                "write_enable": In(1),
                "write_address": In(range(depth)),
                "write_data": In(width),
                "read_enable": In(1),
                "read_address": In(range(depth)),
                "read_data": Out(width),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        ports = {f"i_{name}": getattr(self, name) for name in self.signature.members}
        ports["o_read_data"] = ports.pop("i_read_data")
        return Instance(
            "speq_ram",
            p_WIDTH=self.width,
            p_DEPTH=self.depth,
            p_ADDRESS=len(self.read_address),
            i_clk=ClockSignal(),
            **ports,
        )
