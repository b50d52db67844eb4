from model.cycles import *
