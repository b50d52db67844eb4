from sim.benches.world import *
