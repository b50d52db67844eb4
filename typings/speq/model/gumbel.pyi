from model.gumbel import *
