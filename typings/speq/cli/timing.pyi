from cli.timing import *
