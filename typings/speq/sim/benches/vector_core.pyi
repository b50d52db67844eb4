from sim.benches.vector_core import *
