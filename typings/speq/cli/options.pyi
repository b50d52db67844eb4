from cli.options import *
