from model.encoding import *
