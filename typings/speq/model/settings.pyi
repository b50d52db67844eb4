from model.settings import *
