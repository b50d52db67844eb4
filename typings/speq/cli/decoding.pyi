from cli.decoding import *
