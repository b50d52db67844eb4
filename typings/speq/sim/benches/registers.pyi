from sim.benches.registers import *
