from cli.tables import *
