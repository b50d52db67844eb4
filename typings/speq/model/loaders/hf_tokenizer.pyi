from model.loaders.hf_tokenizer import *
