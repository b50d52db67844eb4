from hw.vector.operand_requests import *
