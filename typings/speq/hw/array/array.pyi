from hw.array.array import *
