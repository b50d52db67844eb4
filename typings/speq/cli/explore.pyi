from cli.explore import *
