from hw.vector.sigmoid import *
