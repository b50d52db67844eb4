from hw.memory.plane_merger import *
