from host.vector_model import *
