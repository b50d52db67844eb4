from sim.benches.streams import *
