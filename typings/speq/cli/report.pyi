from cli.report import *
