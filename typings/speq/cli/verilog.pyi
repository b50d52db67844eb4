from cli.verilog import *
