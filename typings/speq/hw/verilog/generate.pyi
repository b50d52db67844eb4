from hw.verilog.generate import *
