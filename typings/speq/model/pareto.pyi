from model.pareto import *
