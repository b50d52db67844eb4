from hw.memory.write_mux import *
