from cli.area import *
