from sim.compare import *
