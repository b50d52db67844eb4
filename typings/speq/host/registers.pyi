from host.registers import *
