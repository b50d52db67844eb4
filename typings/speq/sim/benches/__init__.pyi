from sim.benches import *
