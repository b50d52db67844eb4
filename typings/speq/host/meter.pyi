from host.meter import *
