from host.vector_image import *
