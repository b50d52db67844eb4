from hw.memory.read_router import *
