from hw.control.run_control import *
