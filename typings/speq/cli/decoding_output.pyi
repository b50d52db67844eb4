from cli.decoding_output import *
