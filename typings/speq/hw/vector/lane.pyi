from hw.vector.lane import *
