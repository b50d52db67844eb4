from sim.benches.perturber import *
