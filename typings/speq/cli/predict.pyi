from cli.predict import *
