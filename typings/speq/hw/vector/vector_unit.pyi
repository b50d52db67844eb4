from hw.vector.vector_unit import *
