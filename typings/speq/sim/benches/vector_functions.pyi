from sim.benches.vector_functions import *
