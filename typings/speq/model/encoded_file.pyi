from model.encoded_file import *
