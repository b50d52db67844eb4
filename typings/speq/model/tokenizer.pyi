from model.tokenizer import *
