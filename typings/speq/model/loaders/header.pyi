from model.loaders.header import *
