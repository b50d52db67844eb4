from model.format import *
