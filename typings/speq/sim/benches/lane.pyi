from sim.benches.lane import *
