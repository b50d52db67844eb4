from sim.benches.memory import *
