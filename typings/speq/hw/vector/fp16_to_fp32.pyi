from hw.vector.fp16_to_fp32 import *
