from hw.vector.activation_quantizer import *
