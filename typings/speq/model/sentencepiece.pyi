from model.sentencepiece import *
