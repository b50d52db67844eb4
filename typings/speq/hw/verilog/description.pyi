from hw.verilog.description import *
