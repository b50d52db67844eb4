from sim.board_server import *
