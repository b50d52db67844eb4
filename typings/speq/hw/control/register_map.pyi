from hw.control.register_map import *
