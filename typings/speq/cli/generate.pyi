from cli.generate import *
