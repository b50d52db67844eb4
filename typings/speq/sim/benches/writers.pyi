from sim.benches.writers import *
