from sim.benches.stimulus import *
