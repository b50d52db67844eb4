from sim.benches.gemm_engine import *
