from model.loaders.llama2c import *
