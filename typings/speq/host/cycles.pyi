from host.cycles import *
