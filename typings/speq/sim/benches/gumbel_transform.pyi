from sim.benches.gumbel_transform import *
