from model.loaders.hf_objects import *
