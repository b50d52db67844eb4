from sim.benches.pe import *
