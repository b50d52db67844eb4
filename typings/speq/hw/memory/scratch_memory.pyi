from hw.memory.scratch_memory import *
