from hw.sampling.philox import *
