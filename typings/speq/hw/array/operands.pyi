from hw.array.operands import *
