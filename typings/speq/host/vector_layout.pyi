from host.vector_layout import *
