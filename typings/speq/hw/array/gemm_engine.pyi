from hw.array.gemm_engine import *
