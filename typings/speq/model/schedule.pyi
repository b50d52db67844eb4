from model.schedule import *
