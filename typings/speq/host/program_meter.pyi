from host.program_meter import *
