from hw.verilog import *
