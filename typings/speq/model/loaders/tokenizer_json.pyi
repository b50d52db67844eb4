from model.loaders.tokenizer_json import *
