from model.noise_format import *
