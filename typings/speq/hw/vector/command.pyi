from hw.vector.command import *
