from cli.synthesis import *
