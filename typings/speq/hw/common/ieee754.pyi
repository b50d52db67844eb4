from hw.common.ieee754 import *
