from sim.benches.entry_mover import *
