from model.pass_cycles import *
