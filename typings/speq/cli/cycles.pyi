from cli.cycles import *
