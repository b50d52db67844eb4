from model.encoder import *
