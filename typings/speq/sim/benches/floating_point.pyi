from sim.benches.floating_point import *
