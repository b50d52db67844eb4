from hw.control.fp32_gap import *
