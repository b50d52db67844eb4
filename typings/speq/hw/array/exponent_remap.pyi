from hw.array.exponent_remap import *
