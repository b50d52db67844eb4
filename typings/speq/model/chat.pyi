from model.chat import *
