from model.aliases import *
