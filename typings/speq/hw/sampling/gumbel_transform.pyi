from hw.sampling.gumbel_transform import *
