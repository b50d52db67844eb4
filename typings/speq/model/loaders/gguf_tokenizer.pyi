from model.loaders.gguf_tokenizer import *
