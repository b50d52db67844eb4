from cli.notes import *
