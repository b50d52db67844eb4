from host.board import *
