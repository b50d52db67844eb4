from cli.demo import *
