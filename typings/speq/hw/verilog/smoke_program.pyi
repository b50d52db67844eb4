from hw.verilog.smoke_program import *
