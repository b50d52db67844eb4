from host.programs import *
