from cli.image import *
