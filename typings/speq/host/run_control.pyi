from host.run_control import *
