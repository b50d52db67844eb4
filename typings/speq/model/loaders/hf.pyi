from model.loaders.hf import *
