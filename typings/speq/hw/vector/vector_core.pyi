from hw.vector.vector_core import *
