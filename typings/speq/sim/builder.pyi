from sim.builder import *
