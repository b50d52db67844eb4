from hw.memory.memory_reader import *
