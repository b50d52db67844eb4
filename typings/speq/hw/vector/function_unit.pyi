from hw.vector.function_unit import *
