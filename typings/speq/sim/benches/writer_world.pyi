from sim.benches.writer_world import *
