from hw.verilog.testbench import *
