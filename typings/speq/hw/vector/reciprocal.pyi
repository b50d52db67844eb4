from hw.vector.reciprocal import *
