from hw.vector.row_maximum import *
