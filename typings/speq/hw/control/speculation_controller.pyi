from hw.control.speculation_controller import *
