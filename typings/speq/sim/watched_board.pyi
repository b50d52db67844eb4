from sim.watched_board import *
