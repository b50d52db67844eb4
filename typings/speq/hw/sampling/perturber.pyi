from hw.sampling.perturber import *
