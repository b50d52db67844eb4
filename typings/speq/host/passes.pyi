from host.passes import *
