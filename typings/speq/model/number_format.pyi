from model.number_format import *
