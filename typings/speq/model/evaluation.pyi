from model.evaluation import *
