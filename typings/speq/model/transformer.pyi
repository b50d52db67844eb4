from model.transformer import *
