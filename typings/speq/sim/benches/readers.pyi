from sim.benches.readers import *
