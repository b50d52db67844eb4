from model.competitors import *
