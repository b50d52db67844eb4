from sim.benches.gemm_engine_clock import *
