from host.vector_passes import *
