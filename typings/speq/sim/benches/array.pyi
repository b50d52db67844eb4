from sim.benches.array import *
