from hw.vector.operand_reader import *
