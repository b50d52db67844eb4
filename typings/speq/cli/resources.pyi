from cli.resources import *
