from host.checks import *
