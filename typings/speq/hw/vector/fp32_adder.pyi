from hw.vector.fp32_adder import *
