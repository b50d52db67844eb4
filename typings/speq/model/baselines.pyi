from model.baselines import *
