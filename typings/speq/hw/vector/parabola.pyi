from hw.vector.parabola import *
