from hw.control.register_file import *
