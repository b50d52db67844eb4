from hw.memory.memory_writer import *
