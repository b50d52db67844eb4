from hw.array.pe import *
