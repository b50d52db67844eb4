from sim.simulated_board import *
