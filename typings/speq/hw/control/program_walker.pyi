from hw.control.program_walker import *
