from sim.benches.philox import *
