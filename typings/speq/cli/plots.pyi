from cli.plots import *
