from hw.memory.write_router import *
