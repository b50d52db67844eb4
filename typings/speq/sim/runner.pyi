from sim.runner import *
