from hw.array import *
