from cli.fpga import *
