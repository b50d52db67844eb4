from hw.memory.result_writer import *
