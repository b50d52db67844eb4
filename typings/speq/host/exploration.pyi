from host.exploration import *
