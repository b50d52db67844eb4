from hw.memory.group_reader import *
