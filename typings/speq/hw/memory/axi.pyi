from hw.memory.axi import *
