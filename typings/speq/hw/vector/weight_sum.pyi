from hw.vector.weight_sum import *
