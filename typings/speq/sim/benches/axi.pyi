from sim.benches.axi import *
