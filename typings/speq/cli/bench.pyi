from cli.bench import *
