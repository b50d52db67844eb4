from model.loaders.gguf import *
