from cli.sizes import *
