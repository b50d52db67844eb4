from hw.memory.weight_reader import *
