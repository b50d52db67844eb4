from hw.vector import *
