from model.speculation import *
