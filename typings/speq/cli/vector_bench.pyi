from cli.vector_bench import *
