from hw.memory.write_combiner import *
