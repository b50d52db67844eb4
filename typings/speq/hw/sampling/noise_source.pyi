from hw.sampling.noise_source import *
