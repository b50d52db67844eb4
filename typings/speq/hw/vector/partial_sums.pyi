from hw.vector.partial_sums import *
