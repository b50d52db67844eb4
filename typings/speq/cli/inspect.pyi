from cli.inspect import *
