from model.emulation import *
