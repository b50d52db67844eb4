from model.train_tiny import *
