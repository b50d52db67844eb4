from cli.evaluate import *
