from hw.vector.fp32_maximum import *
