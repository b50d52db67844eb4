from host.inspection import *
