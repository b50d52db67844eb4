from hw.common.ram_fifo import *
