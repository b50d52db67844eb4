from hw.vector.attention_mask import *
