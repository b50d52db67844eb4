from hw.vector.transposer import *
