from hw.vector.entry_mover import *
