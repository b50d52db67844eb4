from model.loaders import *
