from cli.train_tiny import *
