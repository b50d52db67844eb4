from model.arith import *
