from hw.sampling import *
