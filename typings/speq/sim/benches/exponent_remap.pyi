from sim.benches.exponent_remap import *
