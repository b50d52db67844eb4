from sim.benches.reader_world import *
