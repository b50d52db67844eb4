from sim.fst import *
