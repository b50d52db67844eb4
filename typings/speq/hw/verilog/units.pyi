from hw.verilog.units import *
