from cli.waves import *
