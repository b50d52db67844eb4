from hw.vector.block_quantizer import *
