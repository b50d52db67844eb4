from hw.memory.tile_reader import *
