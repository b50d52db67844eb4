from sim.benches.ram import *
