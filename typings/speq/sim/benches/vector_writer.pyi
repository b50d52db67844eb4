from sim.benches.vector_writer import *
