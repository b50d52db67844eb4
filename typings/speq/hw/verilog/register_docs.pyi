from hw.verilog.register_docs import *
