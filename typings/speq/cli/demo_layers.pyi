from cli.demo_layers import *
