// SPDX-License-Identifier: Apache-2.0
//
// The simulated board: the accelerator, the memory behind its ports (memory_model.cpp), and a
// master for its registers that needs one request and one answer per access.

// Read half of an AXI4 slave port.
module memory_read_port #(
  parameter string NAME = "",
  parameter int DATA_BITS = 64,
  parameter int ADDRESS_BITS = 40,
  parameter int ID_BITS = 1
) (
  input  logic clk,
  input  logic rst,
  input  logic [ID_BITS-1:0] arid,
  input  logic [ADDRESS_BITS-1:0] araddr,
  input  logic [7:0] arlen,
  input  logic [2:0] arsize,
  input  logic [1:0] arburst,
  input  logic arvalid,
  output logic arready,
  output logic [ID_BITS-1:0] rid,
  output logic [DATA_BITS-1:0] rdata,
  output logic [1:0] rresp,
  output logic rlast,
  output logic rvalid,
  input  logic rready
);
  import "DPI-C" function int memory_open_read(input string name, input int beat_bytes);
  import "DPI-C" function void memory_read(
    input int index, input bit rst,
    input bit arvalid, input int unsigned arid, input longint unsigned araddr,
    input int unsigned arlen, input int unsigned arsize, input int unsigned arburst,
    input bit rready,
    output bit arready, output bit rvalid, output int unsigned rid, output bit [1023:0] rdata,
    output int unsigned rresp, output bit rlast
  );

  int index;
  bit next_arready, next_rvalid, next_rlast;
  int unsigned next_rid, next_rresp;
  bit [1023:0] next_rdata;

  initial index = memory_open_read(NAME, DATA_BITS / 8);

  always @(posedge clk) begin
    memory_read(
      index, rst, arvalid, 32'(arid), 64'(araddr), 32'(arlen), 32'(arsize), 32'(arburst), rready,
      next_arready, next_rvalid, next_rid, next_rdata, next_rresp, next_rlast
    );
    arready <= next_arready;
    rvalid <= next_rvalid;
    if (next_rvalid) begin
      rid <= ID_BITS'(next_rid);
      rdata <= DATA_BITS'(next_rdata);
      rresp <= 2'(next_rresp);
      rlast <= next_rlast;
    end
  end
endmodule

// Write half of an AXI4 slave port.
module memory_write_port #(
  parameter string NAME = "",
  parameter int DATA_BITS = 64,
  parameter int ADDRESS_BITS = 40,
  parameter int ID_BITS = 1
) (
  input  logic clk,
  input  logic rst,
  input  logic [ID_BITS-1:0] awid,
  input  logic [ADDRESS_BITS-1:0] awaddr,
  input  logic [7:0] awlen,
  input  logic [2:0] awsize,
  input  logic [1:0] awburst,
  input  logic awvalid,
  output logic awready,
  input  logic [DATA_BITS-1:0] wdata,
  input  logic [DATA_BITS/8-1:0] wstrb,
  input  logic wlast,
  input  logic wvalid,
  output logic wready,
  output logic [ID_BITS-1:0] bid,
  output logic [1:0] bresp,
  output logic bvalid,
  input  logic bready
);
  import "DPI-C" function int memory_open_write(input string name, input int beat_bytes);
  import "DPI-C" function void memory_write(
    input int index, input bit rst,
    input bit awvalid, input int unsigned awid, input longint unsigned awaddr,
    input int unsigned awlen, input int unsigned awsize, input int unsigned awburst,
    input bit wvalid, input bit [1023:0] wdata, input bit [127:0] wstrb, input bit wlast,
    input bit bready,
    output bit awready, output bit wready, output bit bvalid, output int unsigned bid,
    output int unsigned bresp
  );

  int index;
  bit next_awready, next_wready, next_bvalid;
  int unsigned next_bid, next_bresp;

  initial index = memory_open_write(NAME, DATA_BITS / 8);

  always @(posedge clk) begin
    memory_write(
      index, rst, awvalid, 32'(awid), 64'(awaddr), 32'(awlen), 32'(awsize), 32'(awburst),
      wvalid, 1024'(wdata), 128'(wstrb), wlast, bready,
      next_awready, next_wready, next_bvalid, next_bid, next_bresp
    );
    awready <= next_awready;
    wready <= next_wready;
    bvalid <= next_bvalid;
    bid <= ID_BITS'(next_bid);
    bresp <= 2'(next_bresp);
  end
endmodule

// Clock and reset come from the test. A request is made by toggling `request`, with `kind`,
// `address` and `data` in place; it is answered when `done` is equal to `request` again.
//   kind 0: read the register at `address` into `answer`
//   kind 1: write `data` to it
//   kind 2: wait until irq is high, or `data` cycles; `answer` is irq
// `response` is xRESP, or TIMEOUT where the register port did not answer within ANSWER_CYCLES.
//
// A test may instead drive s_axi_control_* itself: the master drives them in reset and during a
// request, and leaves them alone otherwise.
module board #(
  parameter int WEIGHTS_BITS = 64,
  parameter int DATA_BITS = 64,
  parameter int ADDRESS_BITS = 40,
  parameter int WEIGHTS_ID_BITS = 1,
  parameter int DATA_ID_BITS = 1
) (
  input logic clk /*verilator public_flat_rw*/,
  input logic rst /*verilator public_flat_rw*/
);
  localparam int ANSWER_CYCLES = 10000;
  localparam bit [2:0] TIMEOUT = 4;

  logic irq /*verilator public_flat_rd*/;
  // Clock edges since reset.
  longint unsigned cycle /*verilator public_flat_rd*/;

  // Registers.

  logic request /*verilator public_flat_rw*/;
  logic [1:0] kind /*verilator public_flat_rw*/;
  logic [11:0] address /*verilator public_flat_rw*/;
  logic [31:0] data /*verilator public_flat_rw*/;
  logic done /*verilator public_flat_rd*/;
  logic [31:0] answer /*verilator public_flat_rd*/;
  logic [2:0] response /*verilator public_flat_rd*/;

  logic [11:0] s_axi_control_awaddr /*verilator public_flat_rw*/;
  logic [2:0] s_axi_control_awprot /*verilator public_flat_rw*/;
  logic s_axi_control_awvalid /*verilator public_flat_rw*/;
  logic s_axi_control_awready /*verilator public_flat_rd*/;
  logic [31:0] s_axi_control_wdata /*verilator public_flat_rw*/;
  logic [3:0] s_axi_control_wstrb /*verilator public_flat_rw*/;
  logic s_axi_control_wvalid /*verilator public_flat_rw*/;
  logic s_axi_control_wready /*verilator public_flat_rd*/;
  logic [1:0] s_axi_control_bresp /*verilator public_flat_rd*/;
  logic s_axi_control_bvalid /*verilator public_flat_rd*/;
  logic s_axi_control_bready /*verilator public_flat_rw*/;
  logic [11:0] s_axi_control_araddr /*verilator public_flat_rw*/;
  logic [2:0] s_axi_control_arprot /*verilator public_flat_rw*/;
  logic s_axi_control_arvalid /*verilator public_flat_rw*/;
  logic s_axi_control_arready /*verilator public_flat_rd*/;
  logic [31:0] s_axi_control_rdata /*verilator public_flat_rd*/;
  logic [1:0] s_axi_control_rresp /*verilator public_flat_rd*/;
  logic s_axi_control_rvalid /*verilator public_flat_rd*/;
  logic s_axi_control_rready /*verilator public_flat_rw*/;

  logic accessing, waiting;
  logic [31:0] left;

  always @(posedge clk) begin
    if (rst) begin
      cycle <= 0;
      done <= 0;
      accessing <= 0;
      waiting <= 0;
      s_axi_control_awvalid <= 0;
      s_axi_control_awprot <= 0;
      s_axi_control_wvalid <= 0;
      s_axi_control_bready <= 0;
      s_axi_control_arvalid <= 0;
      s_axi_control_arprot <= 0;
      s_axi_control_rready <= 0;
    end else begin
      cycle <= cycle + 1;
      if (waiting) begin
        left <= left - 1;
        if (irq || left == 0) begin
          answer <= 32'(irq);
          waiting <= 0;
          done <= request;
        end
      end else if (accessing) begin
        left <= left - 1;
        if (s_axi_control_awready) s_axi_control_awvalid <= 0;
        if (s_axi_control_wready) s_axi_control_wvalid <= 0;
        if (s_axi_control_arready) s_axi_control_arvalid <= 0;
        if (s_axi_control_rvalid && s_axi_control_rready
            || s_axi_control_bvalid && s_axi_control_bready || left == 0) begin
          answer <= s_axi_control_rdata;
          response <= left == 0 ? TIMEOUT
              : {1'b0, kind[0] ? s_axi_control_bresp : s_axi_control_rresp};
          s_axi_control_bready <= 0;
          s_axi_control_rready <= 0;
          accessing <= 0;
          done <= request;
        end
      end else if (request != done) begin
        response <= 0;
        if (kind[1]) begin
          waiting <= 1;
          left <= data;
        end else begin
          accessing <= 1;
          left <= ANSWER_CYCLES;
          if (kind[0]) begin
            s_axi_control_awaddr <= address;
            s_axi_control_awvalid <= 1;
            s_axi_control_wdata <= data;
            s_axi_control_wstrb <= '1;
            s_axi_control_wvalid <= 1;
            s_axi_control_bready <= 1;
          end else begin
            s_axi_control_araddr <= address;
            s_axi_control_arvalid <= 1;
            s_axi_control_rready <= 1;
          end
        end
      end
    end
  end

  // Memory.

  logic [WEIGHTS_ID_BITS-1:0] m_axi_weights_arid, m_axi_weights_rid;
  logic [ADDRESS_BITS-1:0] m_axi_weights_araddr;
  logic [7:0] m_axi_weights_arlen;
  logic [2:0] m_axi_weights_arsize;
  logic [1:0] m_axi_weights_arburst, m_axi_weights_rresp;
  logic m_axi_weights_arvalid, m_axi_weights_arready;
  logic m_axi_weights_rlast, m_axi_weights_rvalid, m_axi_weights_rready;
  logic [WEIGHTS_BITS-1:0] m_axi_weights_rdata;

  logic [DATA_ID_BITS-1:0] m_axi_data_arid, m_axi_data_rid, m_axi_data_awid, m_axi_data_bid;
  logic [ADDRESS_BITS-1:0] m_axi_data_araddr, m_axi_data_awaddr;
  logic [7:0] m_axi_data_arlen, m_axi_data_awlen;
  logic [2:0] m_axi_data_arsize, m_axi_data_awsize;
  logic [1:0] m_axi_data_arburst, m_axi_data_awburst, m_axi_data_rresp, m_axi_data_bresp;
  logic m_axi_data_arvalid, m_axi_data_arready, m_axi_data_awvalid, m_axi_data_awready;
  logic m_axi_data_rlast, m_axi_data_rvalid, m_axi_data_rready;
  logic m_axi_data_wlast, m_axi_data_wvalid, m_axi_data_wready;
  logic m_axi_data_bvalid, m_axi_data_bready;
  logic [DATA_BITS-1:0] m_axi_data_rdata, m_axi_data_wdata;
  logic [DATA_BITS/8-1:0] m_axi_data_wstrb;

  memory_read_port #(
    .NAME("weights"), .DATA_BITS(WEIGHTS_BITS), .ADDRESS_BITS(ADDRESS_BITS),
    .ID_BITS(WEIGHTS_ID_BITS)
  ) weights_read (
    .clk, .rst,
    .arid(m_axi_weights_arid), .araddr(m_axi_weights_araddr), .arlen(m_axi_weights_arlen),
    .arsize(m_axi_weights_arsize), .arburst(m_axi_weights_arburst),
    .arvalid(m_axi_weights_arvalid), .arready(m_axi_weights_arready),
    .rid(m_axi_weights_rid), .rdata(m_axi_weights_rdata), .rresp(m_axi_weights_rresp),
    .rlast(m_axi_weights_rlast), .rvalid(m_axi_weights_rvalid), .rready(m_axi_weights_rready)
  );

  memory_read_port #(
    .NAME("data"), .DATA_BITS(DATA_BITS), .ADDRESS_BITS(ADDRESS_BITS), .ID_BITS(DATA_ID_BITS)
  ) data_read (
    .clk, .rst,
    .arid(m_axi_data_arid), .araddr(m_axi_data_araddr), .arlen(m_axi_data_arlen),
    .arsize(m_axi_data_arsize), .arburst(m_axi_data_arburst),
    .arvalid(m_axi_data_arvalid), .arready(m_axi_data_arready),
    .rid(m_axi_data_rid), .rdata(m_axi_data_rdata), .rresp(m_axi_data_rresp),
    .rlast(m_axi_data_rlast), .rvalid(m_axi_data_rvalid), .rready(m_axi_data_rready)
  );

  memory_write_port #(
    .NAME("data"), .DATA_BITS(DATA_BITS), .ADDRESS_BITS(ADDRESS_BITS), .ID_BITS(DATA_ID_BITS)
  ) data_write (
    .clk, .rst,
    .awid(m_axi_data_awid), .awaddr(m_axi_data_awaddr), .awlen(m_axi_data_awlen),
    .awsize(m_axi_data_awsize), .awburst(m_axi_data_awburst),
    .awvalid(m_axi_data_awvalid), .awready(m_axi_data_awready),
    .wdata(m_axi_data_wdata), .wstrb(m_axi_data_wstrb), .wlast(m_axi_data_wlast),
    .wvalid(m_axi_data_wvalid), .wready(m_axi_data_wready),
    .bid(m_axi_data_bid), .bresp(m_axi_data_bresp), .bvalid(m_axi_data_bvalid),
    .bready(m_axi_data_bready)
  );

  // Attributes of bursts make no difference to this memory.
  speq_top accelerator (
    .*,
    .m_axi_weights_arcache(), .m_axi_weights_arprot(), .m_axi_data_arcache(),
    .m_axi_data_arprot(), .m_axi_data_awcache(), .m_axi_data_awprot()
  );

`ifdef WAVES
  longint unsigned waves_start, waves_stop;
  initial begin
    if (!$value$plusargs("waves_start=%d", waves_start)) waves_start = '1;
    if (!$value$plusargs("waves_stop=%d", waves_stop)) waves_stop = '1;
  end
  always @(posedge clk) begin
    if (!rst && cycle == waves_start) begin
      $dumpfile("waves.vcd");
      $dumpvars;
    end
    // Not $dumpoff, which Verilator ignores.
    if (!rst && cycle == waves_stop) $c("vlSymsp->_traceDumpClose();");
  end
`endif
endmodule
