from sim.benches.operand_reader import *
