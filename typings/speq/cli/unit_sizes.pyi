from cli.unit_sizes import *
