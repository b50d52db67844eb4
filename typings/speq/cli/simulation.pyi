from cli.simulation import *
