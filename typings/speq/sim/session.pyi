from sim.session import *
