from cli.verify_file import *
