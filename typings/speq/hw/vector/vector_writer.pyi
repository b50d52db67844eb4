from hw.vector.vector_writer import *
