from model.prediction import *
