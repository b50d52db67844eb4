from host.vector_programs import *
