from model.vector_ops import *
