from cli.__main__ import *
