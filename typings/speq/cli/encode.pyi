from cli.encode import *
