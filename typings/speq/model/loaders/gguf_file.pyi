from model.loaders.gguf_file import *
