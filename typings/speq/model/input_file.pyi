from model.input_file import *
