from hw.memory.data_port import *
