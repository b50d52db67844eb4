from sim.benches.fp32 import *
