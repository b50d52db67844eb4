from sim.gtkwave import *
