from hw.common.ram import *
