from hw.vector.fp32_to_fp16 import *
