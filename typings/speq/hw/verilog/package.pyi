from hw.verilog.package import *
