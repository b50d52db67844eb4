from hw.verilog.register_rdl import *
