from hw.control.descriptor import *
