from cli.demo_decode import *
