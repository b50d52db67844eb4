from hw.vector.token_reader import *
