from hw.vector.row_values import *
