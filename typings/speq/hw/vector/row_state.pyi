from hw.vector.row_state import *
