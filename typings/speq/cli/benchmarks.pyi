from cli.benchmarks import *
