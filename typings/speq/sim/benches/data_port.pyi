from sim.benches.data_port import *
