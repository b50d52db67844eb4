from hw.memory.read_arbiter import *
