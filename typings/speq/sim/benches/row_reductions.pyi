from sim.benches.row_reductions import *
