from model.checkpoint import *
